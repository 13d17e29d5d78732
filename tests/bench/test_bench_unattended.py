"""The unattended GPU run: a step that fails or hangs neither stops the others nor costs what they found."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.everything import unattended as gpu_unattended
from bench.everything.unattended import Step


class Log:
    def print(self, *_: Any, **__: Any) -> None:
        pass


def step(name: str, code: str, seconds: float = 20.0) -> Step:
    return Step(name, (sys.executable, "-c", code, "{json}"), seconds)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('[1, 2]');"


def test_every_step_ends_and_what_it_found_is_kept(tmp_path: Path) -> None:
    file, child = tmp_path / "run.json", tmp_path / "child"
    hang = f"import subprocess; p = subprocess.Popen(['sleep', '99']); open({str(child)!r}, 'w').write(str(p.pid));"
    todo = [
        step("fails", "print('before'); raise SystemExit(3)"),
        step("hangs", f"{WRITES} {hang} p.wait()", 2.0),
        step("half", "import sys; open(sys.argv[1], 'w').write('[1,')"),
        step("works", WRITES),
    ]
    begin = time.monotonic()
    outcomes = gpu_unattended.run(todo, 60.0, file, Log())
    assert time.monotonic() - begin < 50
    assert [one.state for one in outcomes] == ["failed", "out of time", "ok", "ok"]
    assert [one.code for one in outcomes] == [3, None, 0, 0]
    assert "before" in outcomes[0].tail
    assert [one.found for one in outcomes] == [None, [1, 2], None, [1, 2]]
    command = Path(f"/proc/{child.read_text()}/cmdline")
    assert not command.exists() or not command.read_bytes()  # what a step began is ended with it
    assert [one["state"] for one in json.loads(file.read_text())["steps"]] == [one.state for one in outcomes]
    assert sorted(tmp_path.iterdir()) == sorted([child, file])


def test_no_step_begins_when_the_time_is_up(tmp_path: Path) -> None:
    outcomes = gpu_unattended.run([step("late", WRITES)], 5.0, tmp_path / "run.json", Log())
    assert [one.state for one in outcomes] == ["left out"]
    assert json.loads((tmp_path / "run.json").read_text())["steps"][0]["found"] is None


def test_the_build_comes_first_and_each_comparison_names_its_file() -> None:
    todo = gpu_unattended.steps("cuda", 7, None, tiny=False)
    assert todo[0].command[:2] == ("make", "build-gpu")
    assert all(("{json}" in one.command) != (one.command[0] == "make") for one in todo)
    assert not {"build", "tests", "icr"} & {one.name for one in gpu_unattended.steps("cpu", 1, None, tiny=True)}
