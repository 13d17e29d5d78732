"""LLM rerankers on a GPU: decoders with random weights made on the device in bfloat16, Qwen3-Reranker's prompts.

All engines run in one process: prompts as token ids in, logit(yes) - logit(no) on the host out; sentence-transformers
gets texts. Every model is drawn from the same seed, so that all engines have the same weights.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bench.cross_encoder.gpu_engines import DTYPE, failing_as
from bench.harness.data import Pairs
from bench.harness.timing import EngineError, agreement, interleave
from bench.llm import models as llm_models
from bench.llm.cpu import BFLOAT16_FACTOR, groups_of
from bench.llm.engines import left_padded, tokenise_as_predict

Scores = NDArray[np.float32]
SIZES = (100,)  # a thousand take a model of 8 billion parameters half a minute
TINY_SIZES = (12, 30)
BATCHES = (8, 16, 32, 64, 128)
TINY_BATCHES = (8, 16)


class LlmEngine(ABC):
    """One way to score. `batch` is None where there is none to choose; `others` are the engines loaded before it."""

    name: ClassVar[str]
    setup: ClassVar[str]
    on_text: ClassVar[bool] = False
    batch: int | None = None

    def __init__(self, model: llm_models.LlmModel, device: torch.device) -> None:
        self.model, self.device = model, device

    @abstractmethod
    def load(self, others: dict[str, LlmEngine]) -> None:
        """Makes the engine ready."""

    @abstractmethod
    def scores(self, pairs: Pairs) -> Scores:
        """Equals the scores, float32 (N,), on the host: the call ends when they are there."""

    def spent(self, pairs: Pairs) -> tuple[int, int, float]:
        """Equals (tokens that passed, prefixes among them, operations) of the last call, padding not counted."""
        shape = self.model.shape
        flop = shape.flop(pairs.lengths, shape.settings["vocab_size"])
        return int(pairs.lengths.sum()), 0, flop


class Transformers(LlmEngine):
    name = "transformers"
    setup = "AutoModelForCausalLM, length-sorted left-padded batches, logits_to_keep=1, use_cache=False, SDPA"
    batch = 32

    def load(self, others: dict[str, LlmEngine]) -> None:  # noqa: ARG002
        self.run: Any = llm_models.random_model(self.model.shape, str(self.device), DTYPE)

    @torch.inference_mode()
    def scores(self, pairs: Pairs) -> Scores:
        order, size = np.argsort(-pairs.lengths, kind="stable"), self.batch or 1
        parts = []
        for start in range(0, len(order), size):
            rows = [pairs.ids[row] for row in order[start : start + size]]
            batch = {name: torch.from_numpy(array).to(self.device) for name, array in left_padded(rows).items()}
            logits = self.run(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
            # Read when all batches have been handed to the device.
            parts.append(logits[:, self.model.labels[0]].float() - logits[:, self.model.labels[1]].float())
        out = np.empty(len(order), np.float32)
        out[order] = torch.cat(parts).cpu().numpy()
        return out


class SentenceTransformers(LlmEngine):
    name = "sentence-transformers"
    setup = "CrossEncoder.predict on texts (Transformer and LogitScore modules) around transformers' model object"
    on_text, batch = True, 32

    def load(self, others: dict[str, LlmEngine]) -> None:
        from sentence_transformers import CrossEncoder

        kwargs = {"dtype": getattr(torch, DTYPE), "attn_implementation": "sdpa"}
        self.encoder: Any = CrossEncoder(
            str(self.model.path), device=str(self.device), activation_fn=torch.nn.Identity(), model_kwargs=kwargs
        )
        model = others.get(Transformers.name)
        if model is None:
            raise EngineError("transformers' model, which it would run, did not load")
        self.encoder[0].model = model.run  # type: ignore[attr-defined]

    def scores(self, pairs: Pairs) -> Scores:
        texts = [(pairs.query, document) for document in pairs.documents]
        found: Scores = self.encoder.predict(texts, batch_size=self.batch, show_progress_bar=False)
        return found

    def tokenise(self, pairs: Pairs) -> float:
        start = time.perf_counter()
        tokenise_as_predict(self.encoder, pairs, self.batch or 1)
        return time.perf_counter() - start


class FastRerank(LlmEngine):
    name = "fastrerank"
    setup = "CausalScorer, packed prompts, common prefixes once"
    shares: ClassVar[bool] = True

    def load(self, others: dict[str, LlmEngine]) -> None:
        from fastrerank.engine.torch.causal import CausalScorer

        loaded = others.get(FastRerank.name)
        if isinstance(loaded, FastRerank):
            self.scorer = loaded.scorer
            return
        model = llm_models.random_model(self.model.shape, str(self.device), DTYPE)
        self.scorer = CausalScorer.from_model(model, dtype=DTYPE, device=str(self.device))
        if self.scorer.reason:
            raise EngineError(f"prompts run padded: {self.scorer.reason}")

    def scores(self, pairs: Pairs) -> Scores:
        self.scorer.model.shares = self.shares
        logits, self.cost = self.scorer.label_logits(pairs.ids, np.array(self.model.labels))
        difference: Scores = logits[:, 0] - logits[:, 1]
        return difference

    def spent(self, pairs: Pairs) -> tuple[int, int, float]:
        groups = groups_of(pairs) if self.shares else [(0, pairs.lengths)]
        return self.cost.tokens, self.cost.prefix_tokens, self.model.shape.shared_flop(groups)


class FastRerankUnshared(FastRerank):
    name, shares = "fastrerank-unshared", False
    setup = "the same, every prompt on its own"


# The first one is the yardstick: the others may err twice as much against float32.
ENGINES: tuple[type[LlmEngine], ...] = (Transformers, SentenceTransformers, FastRerank, FastRerankUnshared)


@dataclass
class Row:
    """One engine on one model. `state`: "ok", "failed" or "WRONG", with `detail`; dicts are per documents.

    `weights_bytes`: device memory that the engine holds when loaded; `peak_bytes`: that and what scoring adds at most.
    """

    name: str
    setup: str
    on_text: bool
    state: str = "ok"
    detail: str = ""
    batch: int | None = None
    sweep: dict[int, float] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)
    load_seconds: float = 0.0
    weights_bytes: int | None = None
    peak_bytes: dict[int, int] = field(default_factory=dict)
    tokenise_seconds: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    prefix_tokens: dict[int, int] = field(default_factory=dict)
    flop: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class LlmResult:
    """One model: tokens of the prompts per documents, and the rms error that engines are allowed."""

    name: str
    note: str
    settings: dict[str, Any]
    tokens: dict[int, int]
    bound: float = 0.0
    rows: list[Row] = field(default_factory=list)


def measure(
    name: str,
    result: LlmResult | None,
    folder: Path,
    cache: Path,
    device: torch.device,
    *,
    tiny: bool,
    rounds: int,
    say: Callable[[str], None],
) -> LlmResult:
    """Equals one model's result: every engine checked against float32, then timed in interleaved rounds."""
    shape = llm_models.tiny(llm_models.SHAPES[name]) if tiny else llm_models.SHAPES[name]
    model = llm_models.build(shape, cache, folder, DTYPE, weights=False)
    sizes = TINY_SIZES if tiny else SIZES
    most = model.workload(folder, max(sizes))
    whole = {size: most.head(size) for size in sizes}
    result = result or LlmResult("", "", {}, {})
    result.name, result.note, result.settings = name, model.note, shape.settings
    result.tokens = {size: int(pairs.lengths.sum()) for size, pairs in whole.items()}
    bench = _Bench(model, device, result, whole, TINY_BATCHES if tiny else BATCHES, say)
    say(f"{name}: reference in float32")
    bench.engines(_reference(model, device, whole[sizes[0]]))
    for size in sizes:
        say(f"{name}: {size} documents")
        bench.rounds(size, rounds if size == sizes[0] else max(2, rounds // 2))
    bench.loaded.clear()
    _settle(device)
    return result


class _Bench:
    """The steps of one model."""

    def __init__(
        self,
        model: llm_models.LlmModel,
        device: torch.device,
        result: LlmResult,
        whole: dict[int, Pairs],
        batches: tuple[int, ...],
        say: Callable[[str], None],
    ) -> None:
        self._model, self._device, self._result, self._whole = model, device, result, whole
        self._batches, self._say = batches, say
        self.loaded: dict[str, LlmEngine] = {}

    def engines(self, reference: NDArray[np.float64]) -> None:
        """Loads, sweeps and checks all engines; those that are sound stay loaded."""
        for kind in ENGINES:
            self._say(f"{self._model.shape.name}: {kind.name}")
            row = Row(kind.name, kind.setup, kind.on_text)
            self._result.rows.append(row)
            engine = kind(self._model, self._device)
            try:
                with failing_as(EngineError, kind.name):
                    self._prepare(engine, row)
                    self._check(engine, row, reference)
            except EngineError as error:
                row.state, row.detail = "failed", str(error)
            if row.state == "ok":
                self.loaded[kind.name] = engine
            elif kind is ENGINES[0]:
                raise RuntimeError(f"{kind.name}, the yardstick, is {row.state} on {self._result.name}: {row.detail}")

    def _prepare(self, engine: LlmEngine, row: Row) -> None:
        before, start = _settle(self._device), time.perf_counter()
        engine.load(self.loaded)
        row.load_seconds = time.perf_counter() - start
        held = _settle(self._device)
        small = self._whole[min(self._whole)]
        for batch in self._batches if engine.batch else ():
            engine.batch = batch
            engine.scores(small)
            row.sweep[batch] = min(_seconds(engine, small) for _ in range(2))
        if row.sweep:
            engine.batch = min(row.sweep, key=lambda batch: row.sweep[batch])
        row.batch = engine.batch
        # An engine that runs another one's weights holds as many as that one.
        owner = {SentenceTransformers.name: Transformers.name, FastRerankUnshared.name: FastRerank.name}.get(row.name)
        weights = {one.name: one.weights_bytes for one in self._result.rows}[owner] if owner else held - before
        row.weights_bytes = weights if self._device.type == "cuda" else None
        for size, pairs in self._whole.items():
            if isinstance(engine, SentenceTransformers):
                row.tokenise_seconds[size] = min(engine.tokenise(pairs) for _ in range(2))
            base = _settle(self._device)
            engine.scores(pairs)
            row.tokens[size], row.prefix_tokens[size], row.flop[size] = engine.spent(pairs)
            if row.weights_bytes is not None:
                row.peak_bytes[size] = row.weights_bytes + torch.cuda.max_memory_allocated(self._device) - base

    def _check(self, engine: LlmEngine, row: Row, reference: NDArray[np.float64]) -> None:
        """WRONG is an engine whose rms error against float32 is over twice that of transformers in bfloat16."""
        for size, pairs in self._whole.items():
            scores = engine.scores(pairs).astype(np.float64)[: len(reference)]
            rms = row.check[f"rms at {size}"] = float(np.sqrt(np.mean((scores - reference) ** 2)))
            if row.name == ENGINES[0].name:
                self._result.bound = max(self._result.bound, BFLOAT16_FACTOR * rms)
            if not rms <= self._result.bound:  # false for NaN
                row.state = "WRONG"
                row.detail = f"rms error {rms:.2e} on {size} documents, at most {self._result.bound:.2e} allowed"
            row.check |= agreement(scores, reference)

    def rounds(self, size: int, count: int) -> None:
        pairs = self._whole[size]

        def once(engine: LlmEngine) -> Callable[[], float]:
            def timed() -> float:
                with failing_as(EngineError, engine.name):
                    return _seconds(engine, pairs)

            return timed

        runs = {name: once(engine) for name, engine in self.loaded.items()}
        times, failed = interleave(runs, count, settle=0)
        for row in self._result.rows:
            if row.name in failed:
                row.state, row.detail = "failed", failed[row.name]
            elif row.name in times:
                row.seconds[size] = times[row.name]


@torch.inference_mode()
def _reference(model: llm_models.LlmModel, device: torch.device, pairs: Pairs) -> NDArray[np.float64]:
    """transformers in float32 on the same (bfloat16) weights, eager attention, one prompt at a time."""
    run = llm_models.random_model(model.shape, str(device), DTYPE).float()
    run.set_attn_implementation("eager")
    rows = []
    for ids in pairs.ids:
        batch = {name: torch.from_numpy(array).to(device) for name, array in left_padded([ids]).items()}
        logits = run(**batch, logits_to_keep=1, use_cache=False).logits[0, -1]
        rows.append(float(logits[model.labels[0]].double() - logits[model.labels[1]].double()))
    del run
    _settle(device)
    return np.array(rows)


def _settle(device: torch.device) -> int:
    """Frees what nobody holds, begins a new peak, and returns the bytes that are held; on a CPU nothing, and 0."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def _seconds(engine: LlmEngine, pairs: Pairs) -> float:
    start = time.perf_counter()
    engine.scores(pairs)
    return time.perf_counter() - start
