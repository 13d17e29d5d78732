"""Types that editors check, and what public objects call themselves."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

import fastrerank
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.loading import _DTYPES, ENGINES
from fastrerank.inputs.limits import SIDES
from fastrerank.inputs.prompts import Template
from fastrerank.rerankers.pairwise import ALGORITHMS
from fastrerank.rerankers.schedules import check_windows
from fastrerank.runtime import types
from fastrerank.runtime.naming import model_name, shortened

Tiny = Callable[..., Path]
SNIPPETS = Path(__file__).parents[1] / "support" / "snippets_types.py"


@pytest.mark.nightly
def test_a_type_checker_knows_results_and_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    settings = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *settings, str(SNIPPETS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SNIPPETS.parents[2], check=False)
    found: dict[int, str] = {}
    for line in done.stdout.splitlines():
        match = re.match(rf".*{SNIPPETS.name}:(\d+): (?:note: Revealed type is |error: )(.*)", line)
        if match:
            found[int(match[1])] = re.sub(r"[\w.]*\.(\w+)", r"\1", match[2])
    expected = {}
    for number, line in enumerate(SNIPPETS.read_text().splitlines(), 1):
        if line.startswith("    ") and "  # " in line:
            expected[number] = line.rpartition("  # ")[2].removeprefix("error: ")
    assert found.keys() == expected.keys(), done.stdout + done.stderr
    for number, wanted in expected.items():
        assert wanted in found[number].replace("Union[", ""), (number, found[number])


def test_literals_are_what_the_code_takes() -> None:
    def values(name: str) -> tuple[str, ...]:
        return typing.get_args(getattr(types, name))

    assert set(values("MethodName")) == set(fastrerank.list_methods())
    assert set(values("EngineName")) == set(ENGINES)
    assert set(values("DtypeName")) == set(_DTYPES)
    assert set(values("TruncationSide")) == set(SIDES)
    assert set(values("PairwiseAlgorithm")) == set(ALGORITHMS)
    for rule in values("WindowRule"):
        check_windows(4, 2, rule)
    with pytest.raises(ValueError, match="window_rule"):
        check_windows(4, 2, "every")
    assert sorted(types.__all__) == types.__all__


def public_classes() -> list[type]:
    values = (getattr(fastrerank, name) for name in fastrerank.__all__)
    return [value for value in values if isinstance(value, type)]


@pytest.mark.parametrize("kind", public_classes(), ids=lambda kind: kind.__name__)
def test_every_public_class_has_a_repr(kind: type) -> None:
    assert kind.__repr__ is not object.__repr__


def test_rerankers_name_their_model_and_what_runs_it(tiny: Tiny) -> None:
    folder = tiny("bert")
    for method in ("cross-encoder", "late-interaction", "embedding"):
        reranker: Any = fastrerank.load(folder, method, dtype=torch.bfloat16)
        shown = repr(reranker)
        assert shown == (
            f"{type(reranker).__name__}({shortened(str(folder))!r}, method={method!r}, engine='NativeEncoder', "
            "dtype='bfloat16', device='cpu')"
        )
        assert repr(fastrerank.AsyncReranker(reranker, workers=1)) == f"AsyncReranker({shown}, workers=1)"
    assert repr(object.__new__(fastrerank.PointwiseReranker)) == "PointwiseReranker(method='pointwise')"
    model = fastrerank.CrossEncoder(folder)
    for value in (
        model.tokenizer,
        model.model,
        model.config,
        model.model_card_data,
        model._tokenizer,
        model.checkpoint,
    ):
        assert re.match(r"[A-Z]\w+\(.*\)$", repr(value))
        assert len(repr(value)) < 300
        assert "object at 0x" not in repr(value)
    assert str(folder)[-60:] in repr(open_checkpoint(folder))


def test_long_names_are_shortened() -> None:
    hub = Path("/cache/models--BAAI--bge-reranker-v2-m3/snapshots/953dc6f")
    assert model_name(hub) == "BAAI/bge-reranker-v2-m3"
    assert model_name(Path("/a/b")) == "/a/b"
    assert len(model_name(Path("/a" * 400))) == 100
    assert model_name(Path("/a" * 400)).startswith("...")


def test_other_public_objects() -> None:
    index = fastrerank.CURIndex.from_scores(np.random.default_rng(0).normal(size=(4, 30)))
    assert repr(index) == "CURIndex(30 items, scores of width 4)"
    assert repr(Template.load("qwen3-reranker")) == "Template('qwen3-reranker', kind='pointwise', readout='logits')"
    from fastrerank.data.datasets import judged_query

    candidates = [{"docid": "d1", "text": "the owl " * 90, "rel": 1}, {"docid": "d2", "text": "x", "rel": 0}]
    query = judged_query({"qid": "q1", "query": "who?", "candidates": candidates})
    assert repr(query) == "JudgedQuery('q1', 'who?', 2 candidates, 2 judgements)"


def test_secrets_are_not_shown() -> None:
    pytest.importorskip("fastapi")
    from fastrerank.serve.app import Settings

    assert "hunter2" not in repr(Settings(keys=("hunter2",)))
