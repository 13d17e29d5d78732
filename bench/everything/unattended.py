"""Everything that a GPU should show, in one command and within a time: the comparisons one by one, and the tests.

Each step is a process of its own, which is ended when its time is up; what it wrote until then counts. One JSON file
holds what is known after every step, so that a run that is cut off keeps what it had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_TAIL = 6000  # characters of a step's output that are kept
_LEAST = 20.0  # seconds under which no step is begun


@dataclass(frozen=True)
class Step:
    """A command, the most seconds that it may take, and whether it writes a JSON file where `{json}` stands."""

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass
class Outcome:
    """What became of a step: "ok", "failed", "out of time" or "left out"; `found`: what its JSON file holds."""

    name: str
    command: list[str]
    state: str
    code: int | None = None
    seconds: float = 0.0
    tail: str = ""
    found: Any = None


def steps(device: str, rounds: int, data: Path | None, *, tiny: bool) -> list[Step]:
    """Equals the steps in the order of what they tell."""
    bench = (sys.executable, "-m", "bench.run", "--device", device)
    more = ("--rounds", str(rounds), *(("--tiny",) if tiny else ()), "--json", "{json}")
    texts = ("--data", str(data)) if data else ()
    every = (*bench, "all", *more, *texts)
    python = f"PYTHON={sys.executable}"
    found = [
        Step("build", ("make", "build-gpu", python), 120.0),
        Step("cur", (*every, "--parts", "ceilings,cur"), 60.0),
        Step("icr", (*bench, "icr", *more, *texts), 150.0),
        Step("llm", (*every, "--parts", "ceilings,llm"), 160.0),
        Step("engines", (*every, "--no-compile", "--parts", "ceilings,engines,latency,profile"), 150.0),
        Step("kernels", (*every, "--parts", "ceilings,attention,attention_mass,label_logits"), 100.0),
        Step("tests", ("make", "test-gpu", python), 270.0),
        Step("compiled", (*every, "--only", "minilm,xlmr-large", "--parts", "ceilings,engines"), 120.0),
    ]
    return [step for step in found if device == "cuda" or step.name not in ("build", "tests", "icr")]


def run(todo: Sequence[Step], seconds: float, file: Path, log: Any) -> list[Outcome]:
    """Equals the outcomes of all steps, which end within `seconds`; `file` has them after each."""
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    for number, step in enumerate(todo):
        left = seconds - (time.monotonic() - begin)
        if left < _LEAST:
            outcomes.append(Outcome(step.name, list(step.command), "left out"))
        else:
            log.print(f"[dim]{time.monotonic() - begin:5.0f} s  {step.name}[/dim]", highlight=False)
            outcomes.append(_run(step, min(step.seconds, left - 5), file.with_suffix(f".{number}.part")))
            log.print(f"[dim]         {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s[/dim]", highlight=False)
        _write(outcomes, time.monotonic() - begin, file)
    return outcomes


def _run(step: Step, seconds: float, part: Path) -> Outcome:
    part.parent.mkdir(parents=True, exist_ok=True)
    command = [str(part) if word == "{json}" else word for word in step.command]
    output = part.with_suffix(".log")
    begin = time.monotonic()
    state, code = "ok", None
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            state = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            _end(process)
    outcome = Outcome(step.name, command, state, code, time.monotonic() - begin)
    outcome.tail = output.read_bytes().decode(errors="replace")[-_TAIL:]
    try:
        outcome.found = json.loads(part.read_text())
    except (OSError, ValueError):  # it wrote none, or was ended while it did
        outcome.found = None
    for left in (part, output):
        left.unlink(missing_ok=True)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step with all processes that it began."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(outcomes: list[Outcome], seconds: float, file: Path) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"seconds": seconds, "steps": [asdict(one) for one in outcomes]}, indent=1) + "\n")
    draft.replace(file)


def show(outcomes: Sequence[Outcome], file: Path) -> None:
    """Prints what became of the steps, and the end of what those said that did not end well."""
    for one in outcomes:
        if one.state not in ("ok", "left out"):
            print(f"--- {one.name}: {one.state} ({one.code})\n{one.tail[-1500:]}\n")
    for one in outcomes:
        print(f"{one.name:10s} {one.state:12s} {one.seconds:6.0f} s")
    print(f"everything: {file}")
