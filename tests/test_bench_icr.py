"""The comparison of attention read-outs runs from its command to its JSON, on tiny shapes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
from typer.testing import CliRunner

from bench import gpu_icr, icr_engines, timing
from bench.run import app


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines' processes are forked from one that has imported what they need: eight times that takes half a minute."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*icr_engines.FastRerank.modules])
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("forked")
def test_cpu(tmp_path: Path, data_folder: Path) -> None:
    found = tmp_path / "icr.json"
    command = ["icr", "--tiny", "--dtype", "float32", "--rounds", "1", "--no-memory", "--threads", "1"]
    result = CliRunner().invoke(
        app, [*command, "--data", str(data_folder), "--cache", str(tmp_path), "--json", str(found)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(found.read_text())["results"]["float32"]["rows"]
    assert [row["state"] for row in rows] == ["ok"] * 5
    assert all(row["seconds"] for row in rows)
    checked = {row["name"]: row["check"] for row in rows if row["check"]}
    assert set(checked) == {"eager-float32", "two-pass-float32", "fastrerank-float32"}


def test_gpu_form_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Log:
        def print(self, *_: object, **__: object) -> None:
            pass

    found = gpu_icr.run(gpu_icr.Options("cpu", True, 1, "python -m bench.run icr"), Log())
    assert found.sound
    assert len(found.rows) == 2 * 4
    gpu_icr.write_json(found, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["seconds"]
    gpu_icr.show(found, markdown=True)
    assert "two-pass" in capsys.readouterr().out


def test_two_pass_is_eager() -> None:
    """The rival that recomputes the rows' attention finds what materialised attention holds."""
    import decoders

    icr_engines.register_two_pass()
    prompt = icr_engines.random_prompt(200, decoders.VOCABULARY)
    found = []
    for kind, attention in ((icr_engines.Eager, "eager"), (icr_engines.TwoPass, "bench-two-pass")):
        engine = kind(Path(), Path(), 1)
        engine._model = decoders.build("qwen3").model
        engine._model.set_attn_implementation(attention)
        found.append(engine.scores(prompt))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[0]).max()
    assert torch.is_tensor(engine._model.norm.weight)


def test_core_heads() -> None:
    assert max(icr_engines.core_heads(24, 14)) == (10, 13)
    assert len(icr_engines.core_heads(32, 32)) == 8
    assert icr_engines.increments([(1, 10), (2, 20), (4, 44)]) == [10.0, 12.0]
