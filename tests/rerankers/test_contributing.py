"""CONTRIBUTING's example of a method, as it stands on the page: in Python, on the command line and registered twice."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers_tiny import save_tiny_cross_encoder

import fastrerank
from fastrerank.rerankers.registry import METHODS, find_method, register

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
TEXTS = ["the owl sleeps by day", "a flea lives up to one year", "cats sleep all day"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example's file, and what pip writes for its entry point."""
    (code,) = re.findall(r"<!-- example: symmetric.py -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert code.count("\n") <= 100
    (tmp_path / "symmetric.py").write_text(code)
    (entry,) = re.findall(r"```toml\n(\[project.entry-points.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    installed = tmp_path / "symmetric-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: symmetric\nVersion: 1\n")
    lines = entry.replace('[project.entry-points."fastrerank.methods"]', "[fastrerank.methods]").replace('"', "")
    (installed / "entry_points.txt").write_text(lines)
    return tmp_path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_cross_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def example(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("symmetric", folder / "symmetric.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers end with it."""
    before = dict(METHODS)
    for name in METHODS:
        monkeypatch.setitem(METHODS, name, before[name])
    monkeypatch.setitem(METHODS, "symmetric", METHODS["icr"])
    METHODS.pop("symmetric")


def test_the_example_ranks(example: ModuleType, bert: Path) -> None:
    assert "symmetric" in fastrerank.list_methods()
    reranker = fastrerank.load(str(bert), method="symmetric", num_threads=1)
    assert isinstance(reranker, example.SymmetricReranker)
    plain = fastrerank.CrossEncoder(str(bert))
    there, back = (
        plain.predict(pairs, activation_fn=lambda x: x)
        for pairs in ([("owl", text) for text in TEXTS], [(text, "owl") for text in TEXTS])
    )
    np.testing.assert_array_equal(reranker.score("owl", TEXTS), (there + back) / np.float32(2))
    many = reranker.score_many(["owl", "cat", "x"], [TEXTS, [], TEXTS[:1]])
    assert [len(one) for one in many] == [3, 0, 1]
    assert [hit["corpus_id"] for hit in reranker.rank("owl", TEXTS)] == np.argsort(-(there + back)).tolist()
    assert reranker.last_usage["tokens"] > 0
    with pytest.raises(TypeError, match="takes device, dtype, max_length, num_threads"):
        fastrerank.load(str(bert), method="symmetric", template="x")


def test_the_command_line_finds_it_by_its_entry_point(folder: Path, bert: Path) -> None:
    texts = folder / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    command = [
        sys.executable,
        "-m",
        "fastrerank",
        "rank",
        "owl",
        str(texts),
        "--model",
        str(bert),
        "--method",
        "symmetric",
        "--json",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)}, check=True
    )
    assert sorted(hit["text"] for hit in json.loads(done.stdout)) == sorted(TEXTS)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match=r"method 'icr' is taken by fastrerank\.rerankers\.attention\.icr"):
        register("icr", papers="none")(object)
    with pytest.raises(ValueError, match="name must be a non-empty str"):
        register("", papers="none")
    with pytest.raises(ValueError, match=r"method must be one of cross-encoder, .*, got 'nothing'"):
        find_method("nothing")
