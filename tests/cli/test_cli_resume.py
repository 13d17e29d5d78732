"""Ctrl-C: one line that says what is kept and the command that goes on, exit code 130, and going on gives the same."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers_tiny import save_tiny_cross_encoder
from judged import pool, rows_file
from test_cli import CLI

import fastrerank
from fastrerank.cli import main
from fastrerank.evaluation import comparison as comparison_module
from fastrerank.search import CURIndex


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"), seed=seed) for seed in (0, 1)]


class Stops:
    """A reranker whose call number `after` is a Ctrl-C."""

    def __init__(self, model: Any, after: int) -> None:
        self.model, self.left = model, after

    def score_many(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model.score_many(*arguments, **options)

    rank = score_many

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def command_of(line: str) -> list[str]:
    """The command that a line says to go on with, without the program's name."""
    program, *arguments = shlex.split(line.rpartition(": ")[2])
    assert program == "fastrerank"
    return arguments


def test_an_index_goes_on(
    tiny: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items, queries = tmp_path / "some items.txt", tmp_path / "queries.txt"
    items.write_text("".join(f"cats sleep {'all ' * (i % 7)}day {i}\n" for i in range(3000)))
    queries.write_text("who sleeps\nhow long do fleas live\ncats\n")
    model = fastrerank.load(str(tiny[0]))
    calls: list[Any] = []

    def load(_name: str, **_options: Any) -> Any:
        calls.append(Stops(model, after=1 if not calls else 10**6))
        return calls[-1]

    monkeypatch.setattr(fastrerank, "load", load)
    folder = tmp_path / "index"
    arguments = ["index", "build", str(folder), "--items", str(items), "--queries", str(queries), "--model", "m"]
    assert main(arguments) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastrerank: interrupted; the scores made so far are in {folder / 'build'}; to go on: ")
    assert command_of(line) == arguments
    made = len((folder / "build" / "done.jsonl").read_text().splitlines())
    assert made >= 1
    assert main(command_of(line)) == 0
    whole = CURIndex.build(model, items.read_text().splitlines(), queries.read_text().splitlines(), progress=False)
    again = CURIndex.load(folder)
    assert again.info()["items"] == whole.info()["items"] == 3000
    blocks = 3 * 3000 / 4096
    assert 10**6 - calls[1].left < blocks  # a block fewer than the whole


def test_a_comparison_goes_on_behind_the_systems_that_were_finished(
    tiny: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = rows_file(tmp_path / "data.jsonl", pool(4)), tmp_path / "out folder"
    ran: list[str] = []
    run_apart, stop = comparison_module.run_apart, [True]

    def watched(model: str, *arguments: Any, **options: Any) -> Any:
        ran.append(model)
        if stop and model == str(tiny[1]):
            stop.clear()
            raise KeyboardInterrupt
        return run_apart(model, *arguments, **options)

    monkeypatch.setattr(comparison_module, "run_apart", watched)
    models = ["--model", f"one={tiny[0]}", "--model", f"two={tiny[1]}"]
    arguments = ["eval", str(data), *models, "--out", str(out), "--json"]
    assert main(arguments) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastrerank: interrupted; the systems that were finished are in {out / 'unfinished'}; to ")
    assert command_of(line) == arguments
    assert [path.name for path in (out / "unfinished").iterdir()] == ["one.json"]
    kept = json.loads((out / "unfinished" / "one.json").read_text())
    assert main(command_of(line)) == 0
    assert ran == [str(tiny[0]), str(tiny[1]), str(tiny[1])]
    found = json.loads(capsys.readouterr().out)["results"]["data"]
    assert not (out / "unfinished").exists()
    # the figures are those of a comparison that nobody interrupted, and the seconds those that were kept
    ran.clear()
    assert main([*arguments[:-3], "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["results"]["data"]
    assert ran == [str(tiny[0]), str(tiny[1])]
    assert {name: row["per_query"] for name, row in found.items()} == {
        name: row["per_query"] for name, row in whole.items()
    }
    assert found["one"]["latency_ms"]["p50"] == pytest.approx(1e3 * np.percentile(kept["runs"]["data"][1], 50))


@pytest.mark.parametrize("change", ["options", "texts", "model", "torn"])
def test_what_was_kept_of_something_else_is_not_used(
    tiny: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from fastrerank.evaluation import System, compare

    keep, queries = tmp_path / "unfinished", pool(3)
    asked: list[str] = []
    run_apart = comparison_module.run_apart

    def watched(model: str, *arguments: Any, **options: Any) -> Any:
        if model == "stop":
            raise KeyboardInterrupt
        asked.append(model)
        return run_apart(model, *arguments, **options)

    monkeypatch.setattr(comparison_module, "run_apart", watched)
    one, stop = System("one", model=str(tiny[0])), System("stop", model="stop")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare([one, stop], queries, keep=keep)
    assert asked == [str(tiny[0])]
    if change == "options":
        one = System("one", model=str(tiny[0]), options={"dtype": "int8"})
    elif change == "texts":
        queries = pool(3, seed=1)
    elif change == "model":
        one = System("one", model=str(tiny[1]))
    else:
        (keep / "one.json").write_bytes((keep / "one.json").read_bytes()[:-40])
    with pytest.raises(KeyboardInterrupt):
        compare([one, stop], queries, keep=keep)
    assert len(asked) == 2


@pytest.mark.parametrize("arguments", [["rank", "q", "-", "--model", "m"], ["eval", "DATA", "--model", "m"]])
def test_without_anything_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    data = rows_file(tmp_path / "data.jsonl", pool(2))
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    monkeypatch.setattr(fastrerank, "load", lambda *_, **__: Stops(SimpleNamespace(check_options=dict), after=0))
    if arguments[0] == "rank":
        given[2:3] = [str(data), "--format", "lines"]
    assert main(given) == 130
    (line,) = capsys.readouterr().err.splitlines()
    if arguments[0] == "rank":
        assert line == "fastrerank: interrupted"
    else:
        assert "nothing is kept of a single model without --out FOLDER; to begin again: fastrerank eval " in line
        assert command_of(line) == given


def test_a_real_signal_while_a_comparison_runs(tiny: list[Path], tmp_path: Path) -> None:
    data = rows_file(tmp_path / "data.jsonl", pool(4))
    out = tmp_path / "out"
    systems = [f"s{i}={tiny[i % 2]}" for i in range(40)]
    arguments = ["eval", str(data), *(part for one in systems for part in ("--model", one)), "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a test run in the background of a shell ignores SIGINT, and its children would too
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*CLI, *arguments], **pipes, preexec_fn=heard) as process:
        until = time.monotonic() + 60
        while not (out / "unfinished" / "s0.json").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert command_of(line) == arguments
