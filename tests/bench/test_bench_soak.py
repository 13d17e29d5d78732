"""What the soak and the comparison beside large requests judge: nothing that must hold may fail unseen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
from rich.console import Console

from bench.serve import beside, soak
from bench.serve.hostile import KINDS, bodies

GOOD = {
    "honest": {"200": 10},
    "health_asked": 9,
    "health_longest": 0.5,
    "resident": {"warm": 100 << 20, "end": 140 << 20},
    "killed": {"status": 503, "others": {}, "exit_code": 1, "seconds": 1.0, "answers_again": True},
}


def judged(**changes: Any) -> list[str]:
    findings = soak.Findings({}, 1.0, **{**GOOD, **changes})
    soak._judge(findings)
    return findings.problems


@pytest.mark.parametrize(
    "changes",
    [
        {"wrong": 1},
        {"health_asked": 0},
        {"honest": {"429": 3}},
        {"health_longest": 1.01},
        {"resident": {"warm": 100 << 20, "end": 151 << 20}},
        {"killed": {**GOOD["killed"], "exit_code": 0}},
        {"killed": {**GOOD["killed"], "exit_code": None}},
        {"killed": {**GOOD["killed"], "exit_code": -11}},
        {"killed": {**GOOD["killed"], "status": 200}},
        {"killed": {**GOOD["killed"], "answers_again": False}},
    ],
)
def test_a_soak_tells_what_did_not_hold(changes: Any) -> None:
    assert judged() == []
    assert len(judged(**changes)) == 1


def test_small_requests_beside_large_ones_are_judged() -> None:
    alone = beside.Beside(0.1, 0.2, 0.3, 10, 0, 0, "", {})

    def sound(**changes: Any) -> bool:
        other = dataclasses.replace(alone, **changes)
        return beside.Findings({}, {}, {}, {"alone": alone, "beside": other}).sound

    assert sound()
    assert sound(p50=0.29, p99=1.9)
    for changes in ({"p50": 0.31}, {"p99": 2.1}, {"other": 1}, {"wrong": 1}, {"answered": 0}):
        assert not sound(**changes)


def test_hostile_bodies_are_of_all_kinds_and_no_larger_than_asked() -> None:
    made = list(bodies(len(KINDS), 20_000))
    assert [name for name, _, _ in made] == list(KINDS)
    assert all(
        len(raw) <= 21_000 and route in ("/rerank", "/v1/rerank", "/v2/rerank", "/score") for _, route, raw in made
    )
    assert [raw for *_, raw in bodies(3, 1000, 5, 30)] == [raw for *_, raw in bodies(3, 1000, 5, 30)]


@pytest.mark.nightly
def test_a_short_soak_holds(minilm: Path, tmp_path: Path) -> None:
    """On real shapes, with a head that is random."""
    from bench.harness import models

    checkpoint = models.build("minilm", tmp_path).path
    asked = [("how long do fleas live", [f"fleas live {i} days" for i in range(5)]), ("an owl", ["owls hoot"] * 5)]
    found = soak.run(soak.Options(checkpoint, asked, 0.5, 2, 1, tmp_path, ""), Console(quiet=True))
    assert found.problems == []
    assert found.hostile
    assert np.isfinite(found.health_longest)
    assert minilm
