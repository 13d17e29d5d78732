"""Engines in processes of their own, timed in interleaved rounds.

One process per engine: several OpenMP runtimes in one process disturb each other, and a process's peak memory is then
the engine's. In every round each engine runs once, in rotating order, so that a slow moment of a shared machine hits
all of them alike; ratios are taken within a round and their median is reported.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness.data import Pairs
from bench.harness.memory import peak_bytes

SETTLE = 0.25  # seconds: the previous engine's idle threads spin for up to 200 ms (OpenMP's default) before they sleep
WARM = 8  # documents scored untimed before each timed call, which brings weights and threads back


class EngineError(RuntimeError):
    """An engine's process raised or died; the message is its own."""


class Worker:
    """An engine in a process of its own: one of the ENGINES of `cross_encoder.rivals`, `llm.engines` or `icr.engines`.

    `environment` is set in that process before any library is loaded. What the engine prints goes to `log`.

    Raises
    ------
    EngineError: from any method, with the engine's message, when it fails.

    Examples
    --------
    >>> with Worker("torch-fp32", checkpoint, cache, threads=2) as worker:      # doctest: +SKIP
    ...     worker.call("load")
    ...     worker.call("take", pairs)
    ...     seconds, logits = worker.call("scores")
    """

    def __init__(
        self,
        engine: str,
        checkpoint: Path,
        cache: Path,
        *,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self._log = cache / "logs" / f"{engine.replace('/', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        limits = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        arguments = (far, engine, checkpoint, cache, threads, limits | dict(environment or {}), self._log)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        far.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, verb: str, *arguments: Any) -> Any:
        """Equals `verb(*arguments)` there; the verbs are the methods of `_Verbs`."""
        try:
            self._pipe.send((verb, arguments))
            good, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(5)
            code = self._process.exitcode
            raise EngineError(f"{self.engine}: its process ended ({code}) during {verb}; see {self._log}") from error
        if not good:
            raise EngineError(f"{self.engine}: {verb}: {value}; see {self._log}")
        return value

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(
    pipe: Connection,
    name: str,
    checkpoint: Path,
    cache: Path,
    threads: int,
    environment: dict[str, str],
    log: Path,
) -> None:
    os.environ.update(environment)
    with log.open("w") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())
    from bench.cross_encoder import rivals
    from bench.icr import engines as icr_engines
    from bench.llm import engines as llm_engines

    kinds = rivals.ENGINES | llm_engines.ENGINES | icr_engines.ENGINES
    verbs = _Verbs(kinds[name](checkpoint, cache, threads))
    while True:
        try:
            verb, arguments = pipe.recv()
        except EOFError:  # the parent is done with this engine
            return
        try:
            pipe.send((True, getattr(verbs, verb)(*arguments)))
        except Exception as error:  # handed to the parent, which raises it there
            traceback.print_exc()
            sys.stderr.flush()
            pipe.send((False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


class _Verbs:
    """What a worker's process can be asked to do; times are wall-clock seconds taken inside it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def convert(self, calibration: Sequence[Pairs]) -> None:
        self._engine.calibration = calibration
        self._engine.convert()

    def imports(self) -> None:
        """Imports what the engine needs, so that memory can be told apart from the libraries' own."""
        for module in self._engine.modules:
            importlib.import_module(module)

    def load(self) -> float:
        start = time.perf_counter()
        self._engine.load()
        return time.perf_counter() - start

    def take(self, pairs: Pairs) -> None:
        self._pairs, self._few = pairs, pairs.head(WARM)

    def use(self, setting: dict[str, Any]) -> None:
        self._engine.use(setting)

    def scores(self) -> tuple[float, NDArray[np.float32]]:
        self._engine.scores(self._few)
        start = time.perf_counter()
        logits = self._engine.scores(self._pairs)
        return time.perf_counter() - start, np.asarray(logits, np.float64)

    def rank(self, query: str, documents: list[str]) -> tuple[float, dict[str, float]]:
        start = time.perf_counter()
        ranking = self._engine.rank(query, documents)
        seconds = time.perf_counter() - start
        if len(ranking) != len(documents):
            raise RuntimeError(f"rank returned {len(ranking)} of {len(documents)} documents")
        return seconds, self._engine.stages()

    def tokenise(self) -> float:
        self._engine.tokenise(self._pairs)
        start = time.perf_counter()
        self._engine.tokenise(self._pairs)
        return time.perf_counter() - start

    def spent(self) -> dict[str, int]:
        found: dict[str, int] = self._engine.spent()
        return found

    def peak_bytes(self) -> int:
        return peak_bytes()

    def reset_peak(self) -> None:
        """Lets the peak begin anew at what is resident now; only Linux can."""
        Path("/proc/self/clear_refs").write_text("5")

    def host_peak(self, dtype: str, threads: int) -> float:
        from fastrerank.ops import peak

        return peak(dtype, threads)


def interleave(
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    progress: Callable[[], None] = lambda: None,
    settle: float = SETTLE,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Equals seconds per name, one value per round; every round calls each of `runs` once, starting one further on.

    A run that raises EngineError takes no part from then on: it has no seconds, and its message is in the second
    dict. `progress` is called after every single run, `settle` seconds are slept before it.

    Examples
    --------
    >>> interleave({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)
    ({'a': [1.0, 1.0], 'b': [2.0, 2.0]}, {})
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        names = list(seconds)
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(settle)
            try:
                seconds[name].append(runs[name]())
            except EngineError as error:
                failed[name] = str(error)
                del seconds[name]
            progress()
    return seconds, failed


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Equals the median over rounds of slower / faster, both measured in the same round.

    Examples
    --------
    >>> ratio([2.0, 4.0, 30.0], [1.0, 2.0, 3.0])
    2.0
    """
    return float(np.median(np.asarray(slower) / np.asarray(faster)))


def percentile(seconds: Sequence[float], q: float) -> float:
    """Equals the q-th percentile in milliseconds."""
    return float(np.percentile(np.asarray(seconds), q)) * 1e3


def agreement(logits: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, float]:
    """Equals how far logits are from the reference's.

    Returns
    -------
    "max_delta": max |difference|; "relative": that over the reference's range (max - min); "tau": Kendall's tau-a;
    "top10": share of the reference's ten best that are among these ten best (all of them when N < 10).

    Examples
    --------
    >>> agreement(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))["tau"]
    1.0
    """
    delta = float(np.abs(logits - reference).max())
    count = len(reference)
    above = np.triu_indices(count, 1)
    signs = np.sign(np.subtract.outer(logits, logits))[above] * np.sign(np.subtract.outer(reference, reference))[above]
    best = min(10, count)
    ours, theirs = np.argsort(-logits, kind="stable")[:best], np.argsort(-reference, kind="stable")[:best]
    return {
        "max_delta": delta,
        "relative": delta / float(np.ptp(reference)),
        "tau": float(signs.mean()),
        "top10": len(np.intersect1d(ours, theirs)) / best,
    }


def tie_band(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, float]:
    """Equals how the ranking differs from the reference's.

    Returns
    -------
    "swaps": pairs of documents whose order is another one; "widest_swap": the largest difference of reference scores
    among them, 0 without any.

    Examples
    --------
    >>> tie_band(np.array([1.0, 2.0, 5.0]), np.array([2.0, 1.5, 5.0]))
    {'swaps': 1.0, 'widest_swap': 0.5}
    """
    apart = np.subtract.outer(reference, reference)
    swapped = (apart > 0) & (np.subtract.outer(scores, scores) < 0)
    return {"swaps": float(swapped.sum()), "widest_swap": float(apart[swapped].max(initial=0.0))}
