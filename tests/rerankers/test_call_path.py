"""How many files a reader passes from `rank` to a kernel: the files on the call stack when the kernel is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_models
import pytest
from test_pointwise import save as save_pointwise

import fastrerank

ROOT = Path(fastrerank.__file__).parent
DOCUMENTS = ["the owl sleeps by day", "a flea lives up to a year", "cats sleep"]


def longest_path(call: Callable[[], Any]) -> list[str]:
    """Files of the package on the deepest stack of a call, in the order they are entered, each once."""
    paths: list[list[str]] = [[]]

    def watch(frame: Any, event: str, _argument: Any) -> None:
        files: list[str] = []
        while event == "call" and frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                files.append(path.relative_to(ROOT).as_posix())
            frame = frame.f_back
        paths[0] = max(paths[0], list(dict.fromkeys(reversed(files))), key=len)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return paths[0]


@pytest.mark.parametrize(("method", "most"), [("pointwise", 12), ("icr", 10)])
def test_rank_reaches_its_kernels_through_few_files(method: str, most: int, tmp_path: Path) -> None:
    if method == "pointwise":
        folder = save_pointwise(tmp_path / "Qwen3-Reranker-tiny")
    else:
        folder = attention_models.save(tmp_path, "llama")
    reranker = fastrerank.load(folder, method=method, device="cpu")
    reranker.rank("who sleeps?", DOCUMENTS)
    path = longest_path(lambda: reranker.rank("who sleeps?", DOCUMENTS))
    assert len(path) <= most, path
    assert path[0].startswith("rerankers/")
    assert any(file.startswith("ops/_") for file in path)
