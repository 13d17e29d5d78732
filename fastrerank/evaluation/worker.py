"""A system in its own process, so that its latency and peak memory are its own and its death ends nothing else.

The parent writes a job to a folder and starts `main`. The child reports its progress as JSON lines through a pipe,
writes each data set's run to the folder, and its output goes to a log.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from fastrerank.data.datasets import JudgedQuery, Run
from fastrerank.evaluation.reranking import rerank
from fastrerank.rerankers.loading import load
from fastrerank.rerankers.refusal import OptionRefused

__all__ = ["Outcome", "peak_bytes", "run_apart"]

Progress = Callable[[str, int, int], None]

# The child gets this process's sys.path, so that it imports the same package.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from fastrerank.evaluation.worker import main
sys.exit(main(sys.argv[1], int(sys.argv[2])))
"""


@dataclass
class Outcome:
    """The results of one system, or its error.

    Attributes:
        runs: data set -> (run, seconds of each query, float64 (Q,)), of those that were finished.
        load_seconds: of `fastrerank.load`; None if it was not reached.
        peak: bytes, the most memory that the process held; None if unknown.
        peak_gpu: bytes, the most that torch held on its GPUs; None without one.
        error: what went wrong, in one line; None if nothing did.
        failed: the data set where it went wrong; None: before any.
        detail: the traceback, or the end of what the process printed.
    """

    runs: dict[str, tuple[Run, npt.NDArray[np.float64]]] = field(default_factory=dict)
    load_seconds: float | None = None
    peak: int | None = None
    peak_gpu: int | None = None
    error: str | None = None
    failed: str | None = None
    detail: str = ""


def run_apart(
    model: str,
    options: Mapping[str, Any],
    datasets: Mapping[str, Sequence[JudgedQuery]],
    *,
    top_k: int | None,
    warmup: int,
    progress: Progress | None = None,
) -> Outcome:
    """Equal to `rerank(fastrerank.load(model, **options), ...)` of each data set, in a fresh Python process.

    An exception in the process, or its death, is not raised here: `Outcome.error` holds it.
    `progress` is called with (data set, queries done, queries in all).
    """
    with tempfile.TemporaryDirectory(prefix="fastrerank-eval-") as name:
        folder = Path(name)
        # the child does not need judgements
        asked = {key: [replace(query, judgements={}) for query in queries] for key, queries in datasets.items()}
        job = {"model": model, "options": dict(options), "datasets": asked, "top_k": top_k, "warmup": warmup}
        (folder / "job").write_bytes(pickle.dumps(job))
        outcome = Outcome()
        code = _watch(folder, outcome, progress)
        log = (folder / "log").read_text("utf-8", "replace")
        if outcome.error is None and (code != 0 or len(outcome.runs) < len(datasets)):
            outcome.error = _death(code, log)
            outcome.failed = next((key for key in datasets if key not in outcome.runs), None) if outcome.runs else None
        outcome.detail = log[-4000:] if outcome.error else ""
        return outcome


def _watch(folder: Path, outcome: Outcome, progress: Progress | None) -> int:
    """Run the child, read its events into `outcome`, and return its exit code."""
    reading, writing = os.pipe()
    command = [sys.executable, "-c", _START, str(folder), str(writing), json.dumps(sys.path)]
    with (folder / "log").open("wb") as log, os.fdopen(reading, encoding="utf-8") as events:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writing,))
        finally:
            os.close(writing)
        try:
            for line in events:
                event = json.loads(line)
                if "done" in event and progress is not None:
                    progress(event["dataset"], event["done"], event["of"])
                if "run" in event:
                    outcome.runs[event["dataset"]] = pickle.loads((folder / event["run"]).read_bytes())
                for key in outcome.__dataclass_fields__.keys() & event.keys():
                    setattr(outcome, key, event[key])
            return process.wait()
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()


def _death(code: int, log: str) -> str:
    """One line about a process that ended without reporting an error."""
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}; its last line: {last.strip()}"
    return f"its process ended with exit code {code}; its last line: {last.strip()}"


def peak_bytes() -> int:
    """Return this process's peak resident memory in bytes.

    Linux's VmHWM, because getrusage's ru_maxrss starts at the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_gpu() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())))


def main(job_folder: str, pipe: int) -> int:
    """Do the job in the folder, and report through the file descriptor `pipe`."""
    folder = Path(job_folder)
    with os.fdopen(pipe, "w", encoding="utf-8", buffering=1) as events:
        name: str | None = None
        try:
            job = pickle.loads((folder / "job").read_bytes())
            start = time.perf_counter()
            reranker = load(job["model"], **job["options"])
            _tell(events, load_seconds=time.perf_counter() - start)
            for number, (name, queries) in enumerate(job["datasets"].items()):

                def advance(done: int, of: int, name: str | None = name) -> None:
                    _tell(events, dataset=name, done=done, of=of)

                found = rerank(reranker, queries, top_k=job["top_k"], warmup=job["warmup"], progress=advance)
                _tell(events, peak=peak_bytes(), peak_gpu=_peak_gpu())  # before the run is written, which takes memory
                (folder / f"run{number}").write_bytes(pickle.dumps(found))
                _tell(events, dataset=name, run=f"run{number}")
        except Exception as error:
            traceback.print_exc()
            _tell(events, error=" ".join(f"{type(error).__name__}: {_said(error)}".split()), failed=name)
            return 1
    return 0


def _said(error: Exception) -> str:
    if not isinstance(error, OptionRefused):
        return str(error)
    return f"{error.reason}: {error.option}= is an option of the system (--{error.option} on the command line)"


def _tell(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
