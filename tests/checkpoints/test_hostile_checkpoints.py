"""Hostile checkpoints: each is refused in one line or gives the right score, in a process that no signal ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("resource")
import hostile_checkpoints as hostile
import tiny as factory
import torch_families as families
from test_stored import DENSE, DENSE_TENSORS, save_modules

NATIVE = ("bert", "electra-narrow", "roberta", "distilbert", "modernbert-mean", "modernbert")
TORCH = ("deberta", "qwen3")
# Kinds of errors that say "this checkpoint cannot be served".
REFUSALS = {"ValueError", "OSError", "TypeError", "ImportError", "FloatingPointError"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A right checkpoint of each kind."""
    root = tmp_path_factory.mktemp("bases")
    made = {family: factory.save(root / family, family) for family in NATIVE}
    for family in TORCH:
        model = families.build(family, 1)
        model.save_pretrained(root / family)
        factory.save_tokenizer(root / family, "modernbert")
        made[family] = root / family
    made["vectors"] = save_modules(root / "vectors", DENSE, DENSE_TENSORS)
    return made


@pytest.fixture(scope="module")
def worker(bases: dict[str, Path]) -> Iterator[hostile.Worker]:
    process = hostile.Worker(list(bases.values()))
    yield process
    process.close()


def same(found: Any, expected: Any) -> bool:
    if expected is None or len(found) != len(expected):
        return False
    found, expected = np.array(found), np.array(expected)
    return bool(np.abs(found - expected).max() <= 2e-4 * max(np.abs(expected).max(), 1e-3))


def judge(worker: hostile.Worker, right: dict[str, Any], folder: Path, engine: str | None) -> str:
    """ "" if a folder is refused or scored rightly; else what is wrong with the answer."""
    answer = worker.ask(folder, engine)
    if "died" in answer:
        return f"the process died with {answer['died']}"
    if "error" in answer:
        if not REFUSALS & set(answer["bases"]):
            return f"{answer['error']}: {answer['message'][:300]}"
        long = "\n" in answer["message"].strip() or len(answer["message"]) > 1500
        return f"not one line: {answer['error']}: {answer['message'][:300]!r}" if long else ""
    if same(answer["scores"], right["scores"]) or same(answer["scores"], worker.ask(folder, reference=True)):
        return ""
    return f"other scores: {answer['scores']}, not {right['scores']}"


def sweep(worker: hostile.Worker, bases: dict[str, Path], tmp_path: Path, seeds: range) -> None:
    kinds = list(bases)
    right = {kind: worker.ask(folder) for kind, folder in bases.items()}
    assert all("scores" in answer for answer in right.values()), right
    failures, refused = [], 0
    for seed in seeds:
        kind = kinds[seed // len(hostile.MUTATIONS) % len(kinds)]
        folder = tmp_path / f"{kind}-{seed}"
        mutations = hostile.make(bases[kind], folder, seed, 1 + seed % 5 // 4)
        engine = "torch" if seed % 7 == 3 else None
        problem = judge(worker, right[kind], folder, engine)
        if problem:
            failures.append(f"seed {seed}, {kind}, {engine}, {mutations}: {problem}")
        refused += not problem
    assert not failures, "\n".join(failures)
    assert refused > len(seeds) // 2


def test_hostile_checkpoints_are_refused_or_scored_rightly(
    worker: hostile.Worker, bases: dict[str, Path], tmp_path: Path
) -> None:
    # Steps of 11 go through every mutation and every kind of checkpoint.
    sweep(worker, bases, tmp_path, range(0, 660, 11))


@pytest.mark.nightly
@pytest.mark.parametrize("begin", range(1000, 6000, 500))
def test_many_hostile_checkpoints(worker: hostile.Worker, bases: dict[str, Path], tmp_path: Path, begin: int) -> None:
    sweep(worker, bases, tmp_path, range(begin, begin + 500))


def test_the_sweep_sees_what_it_looks_for(
    worker: hostile.Worker, bases: dict[str, Path], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    right = worker.ask(bases["bert"])
    assert judge(worker, right, tiny("bert", seed=5), None) == ""  # transformers gives these scores too
    assert "other scores" in judge(worker, {"scores": [0.0] * 3}, bases["vectors"], None)
    assert worker.ask(tmp_path / "nothing")["error"] in ("FileNotFoundError", "OSError")
