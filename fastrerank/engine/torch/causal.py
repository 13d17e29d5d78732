"""Label logits of a decoder: one packed forward per batch of prompts, common prefixes once, K rows of the head."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.batch import Segment, check_ids, pack, split, split_equal, split_lengths, split_padded
from fastrerank.engine.memory import CPU_DECODER_TOKENS, forward_budget, halved
from fastrerank.engine.prefixes import Group, share_prefixes, to_segments
from fastrerank.engine.torch.decoder import PackedDecoder
from fastrerank.engine.torch.loading import cast_parameters, load_model
from fastrerank.engine.torch.placement import place_on, stretch, unstretched
from fastrerank.engine.torch.probe import probe_tokens, runner_of
from fastrerank.engine.torch.row_norms import FinalNorm
from fastrerank.engine.usage import Cost

__all__ = ["CausalScorer", "Probes"]

log = logging.getLogger("fastrerank")

Ids = npt.NDArray[np.integer]
# Relative difference from transformers' own logits that passes when a model is loaded.
_AGREES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


class LabelHead:
    """K rows of a decoder's head on normed hidden states, in float32: equals the head's logits at these labels.

    Args:
        weight: (V, hidden) rows as stored; only those asked for are ever read. bias: (V,) or None.
        norm: what stands between the last layer and the head.
        scale, softcap: as `ops.label_logits` takes them.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: FinalNorm,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        self.weight, self.bias, self.norm, self.scale, self.softcap = weight, bias, norm, scale, softcap
        self._rows: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, hidden: torch.Tensor, labels: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return float32 (N, K) of hidden states (N, hidden) before the norm; `labels` is (K,)."""
        weight, bias = self._sliced(labels, hidden.device)
        norm = self.norm
        if norm.module is not None:
            hidden = norm.module(hidden.float())
        return ops.label_logits(
            hidden,
            weight,
            norm=norm.kind,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            bias=bias,
            scale=self.scale,
            softcap=self.softcap,
        )

    def _sliced(self, labels: npt.NDArray[np.int64], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = labels.tobytes()
        if key not in self._rows:
            chosen = torch.from_numpy(labels).to(self.weight.device)
            bias = None if self.bias is None else self.bias[chosen].float().to(device)
            self._rows[key] = (self.weight[chosen].float().to(device), bias)
        return self._rows[key]


class CausalScorer:
    """Logits of a decoder's head at the last token of prompts: equals transformers' logits on each prompt alone.

    One object may be called from many threads.

    Attributes:
        max_length: tokens that the model's positions allow; None where its config names no limit.
        labels: how many labels the head has: the vocabulary's size, or a classifier's.
        shares: whether common prefixes of prompts are computed once.
        budget: tokens of one forward; halved for good when a forward runs out of memory.
        reason: why prompts run padded and share nothing; "" where they run packed.
        skipped: token id that is skipped at the end of prompts, as classifiers skip padding; None for none.
    """

    def __init__(
        self,
        runner: Any,
        head: LabelHead,
        *,
        dtype: str,
        budget: int,
        max_length: int | None,
        num_threads: int | None = None,
        share_prefixes: bool = True,
    ) -> None:
        self._runner, self._head = runner, head
        self.dtype, self.device, self.budget = dtype, runner.device, budget
        self.max_length, self.num_threads = max_length, num_threads
        self.shares = share_prefixes and isinstance(runner, PackedDecoder)
        self.labels = len(head.weight)
        self.reason = ""
        self.skipped: int | None = None
        config = runner.backbone.config.get_text_config()
        self._vocabulary = int(config.vocab_size)
        self._stretch = stretch(config)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int | None = None,
        memory_limit: float | None = None,
        share_prefixes: bool = True,
        head: str = "causal",
    ) -> CausalScorer:
        """Load a decoder through transformers.

        Args:
            checkpoint: opened checkpoint of a `*ForCausalLM`, or with head="classification" of a
                `*ForSequenceClassification` that reads its last token.
            dtype: "float32", "bfloat16" or "float16" for the backbone. Norm, head and logits are float32.
            device: "cpu", "cuda" or "cuda:N".
            num_threads: CPU threads of a call; None for torch's own setting.
            memory_limit: bytes, or a fraction of the device's memory, that the process may come to; None for 0.9.
            share_prefixes: whether common prefixes of a call's prompts are computed once.

        Raises ValueError for a checkpoint without the head, without some of its weights, with weights that are NaN, or
        whose logits are not what its class computes.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint             # doctest: +SKIP
            >>> scorer = CausalScorer.load(open_checkpoint("path"))           # doctest: +SKIP
        """
        ops.num_threads(num_threads)  # checks it
        model = load_model(checkpoint, head, dtype)
        return cls.from_model(
            model,
            dtype=dtype,
            device=device,
            num_threads=num_threads,
            memory_limit=memory_limit,
            share_prefixes=share_prefixes,
            head=head,
        )

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int | None = None,
        memory_limit: float | None = None,
        share_prefixes: bool = True,
        head: str = "causal",
    ) -> CausalScorer:
        """Take over a transformers model in evaluation mode; arguments as in `load`. The model is changed for good.

        Raises ValueError for a model without a linear head, or whose logits are not what its class computes.
        """
        backbone = getattr(model, model.base_model_prefix)
        cast_parameters(backbone, getattr(torch, dtype))
        _, linear = _head_module(model, head)
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        probes = Probes(backbone.config.get_text_config(), len(weight))
        with torch.inference_mode(), place_on(num_threads, weight.device):
            expected = probes.expected(model, head)
        scorer = cls.build(
            backbone,
            weight,
            bias,
            probes,
            expected,
            dtype=dtype,
            device=device,
            num_threads=num_threads,
            memory_limit=memory_limit,
            share_prefixes=share_prefixes,
        )
        if head == "classification":
            scorer.skipped = getattr(backbone.config.get_text_config(), "pad_token_id", None)
        return scorer

    @classmethod
    def build(
        cls,
        backbone: Any,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        probes: Probes,
        expected: npt.NDArray[np.float64],
        *,
        dtype: str,
        device: str,
        num_threads: int | None,
        memory_limit: float | None,
        share_prefixes: bool,
    ) -> CausalScorer:
        """Put a backbone and head rows on a device, and prove them against what `probes` are `expected` to give."""
        place, kind = torch.device(device), getattr(torch, dtype)
        backbone.to(place).eval()
        runner, reason = runner_of(backbone, dtype, None, num_threads=num_threads)
        norm = FinalNorm(None)
        if runner.packed:
            try:
                runner = PackedDecoder(runner)
                norm = runner.norm
            except ValueError as error:
                reason = str(error)
        config = backbone.config.get_text_config()
        scorer = cls(
            runner,
            LabelHead(weight, bias, norm, **_logit_options(config)),
            dtype=dtype,
            budget=forward_budget(config, kind, place, memory_limit, packed=runner.packed, on_cpu=CPU_DECODER_TOKENS),
            max_length=getattr(config, "max_position_embeddings", None),
            num_threads=num_threads,
            share_prefixes=share_prefixes,
        )
        scorer.reason = reason
        error_ = probes.error(scorer, expected)
        if error_ > _AGREES[dtype] and isinstance(runner, PackedDecoder):
            runner.prunes = False
            log.info("%s computes all rows of its last layer", type(backbone).__name__)
            error_ = probes.error(scorer, expected)
        if error_ > _AGREES[dtype]:
            raise ValueError(
                f"label logits of {type(backbone).__name__} differ by {error_:.2g} from its own head's: it does "
                "something to logits that its config does not name in a known way"
            )
        return scorer

    def label_logits(self, prompts: Sequence[Ids], labels: Ids) -> tuple[npt.NDArray[np.float32], Cost]:
        """Return (logits, cost): float32 (N, K) of the head's rows `labels` at the last token of each prompt.

        Args:
            prompts: N sequences of token ids. Equal prompts are computed once, as is what prompts begin with alike.
            labels: (K,) rows of the head: token ids, or classes.

        Raises ValueError naming a prompt that is empty, longer than `max_length` or has ids outside the vocabulary.
        """
        chosen = np.asarray(labels, np.int64)
        self._check(prompts, chosen)
        if self.skipped is not None:
            prompts = [self._without_padding(np.asarray(ids)) for ids in prompts]
        numbers: dict[bytes, int] = {}
        place = [numbers.setdefault(np.asarray(ids).astype(np.int64).tobytes(), len(numbers)) for ids in prompts]
        first = {number: i for i, number in reversed(list(enumerate(place)))}
        distinct = [np.asarray(prompts[first[number]]) for number in range(len(numbers))]
        result = np.full((len(distinct), len(chosen)), np.nan, np.float32)
        with torch.inference_mode(), place_on(self.num_threads, self.device):
            cost = self._fill(distinct, chosen, result)
        return result[place] if place else result, cost

    def _fill(self, prompts: list[Ids], labels: npt.NDArray[np.int64], result: npt.NDArray[np.float32]) -> Cost:
        """Compute the prompts in batches; where memory runs out, halve the budget and go on."""
        waiting = list(range(len(prompts)))
        cost = Cost()
        finished: list[tuple[npt.NDArray[np.int64], torch.Tensor]] = []
        while waiting:
            failed: list[int] = []
            for batch in self._batches([prompts[i] for i in waiting]):
                if failed:
                    failed += batch.members(waiting)
                    continue
                values = self._try(batch, labels)
                if values is None:
                    if batch.size() == 1 or len(batch.members(waiting)) == 1:
                        if self.device.type == "cuda":
                            torch.cuda.empty_cache()
                        raise torch.OutOfMemoryError(
                            f"one prompt of {batch.size()} tokens does not fit in the memory of {self.device}"
                        )
                    failed += batch.members(waiting)
                    self.budget = halved(self.budget, batch.size(), self.device)
                else:
                    finished.append((np.array(batch.members(waiting)), values))
                    cost += Cost(1, batch.size(), batch.prefix_tokens())
            waiting = failed
        for members, values in finished:  # read when all work has been handed to the device
            result[members] = values.cpu().numpy()
        return cost

    def _try(self, batch: _Batch, labels: npt.NDArray[np.int64]) -> torch.Tensor | None:
        try:
            with unstretched(self._runner.backbone, self._stretch, self._lock):
                return self._head(batch.hidden(self._runner), labels)
        except torch.OutOfMemoryError:
            if self.device.type != "cuda":
                raise
        return None

    def _batches(self, prompts: list[Ids]) -> list[_Batch]:
        lengths = np.array([len(ids) for ids in prompts], np.int64)
        # Where rotary frequencies stretch with the longest text of a row, such a text has a row of its own.
        far = np.flatnonzero(lengths > self._stretch) if self._stretch is not None else np.zeros(0, np.int64)
        near = np.setdiff1d(np.arange(len(prompts)), far)
        batches: list[_Batch] = []
        if not isinstance(self._runner, PackedDecoder):
            packed = self._runner.packed  # a model whose layers are not found runs packed, and whole
            divide = split_lengths if packed else split_padded if self._runner.pads else split_equal
            parts = [near[part] for part in divide(lengths[near], self.budget)]
            return [_Rows(prompts, part, packed) for part in [*parts, *far[:, None]]]
        chosen = [prompts[i] for i in near]
        groups = share_prefixes(chosen) if self.shares else [Group((i,), 0) for i in range(len(chosen))]
        segments, ends = to_segments(chosen, groups)
        for taken, index in split(segments, self.budget):
            answers = np.where(index >= 0, ends[np.maximum(index, 0)], -1)
            batches.append(_Packed(taken, np.where(answers >= 0, near[np.maximum(answers, 0)], -1)))
        return batches + [_Packed([Segment(prompts[i], causal=True)], np.array([i])) for i in far]

    def _without_padding(self, ids: Ids) -> Ids:
        content = np.flatnonzero(ids != self.skipped)
        return ids[: content[-1] + 1] if len(content) else ids[:1]

    def _check(self, prompts: Sequence[Ids], labels: npt.NDArray[np.int64]) -> None:
        if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= self.labels:
            raise ValueError(f"labels must be a list of numbers from 0 to {self.labels - 1}, got {labels}")
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompt {i} has no tokens")
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(f"prompt {i} has {len(ids)} tokens, the model takes {self.max_length}")
            check_ids(ids, self._vocabulary, f"prompt {i}: ")


class _Packed:
    """A packed row: its segments, and the prompt that each ends, -1 for prefixes."""

    def __init__(self, segments: list[Segment], answers: npt.NDArray[np.int64]) -> None:
        self.segments, self.answers = segments, answers

    def members(self, waiting: list[int]) -> list[int]:
        return [waiting[i] for i in self.answers if i >= 0]

    def size(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    def prefix_tokens(self) -> int:
        return sum(len(s.ids) for s, i in zip(self.segments, self.answers, strict=True) if i < 0)

    def hidden(self, runner: PackedDecoder) -> torch.Tensor:
        batch = pack(self.segments)
        return runner.last(batch, batch.ends[self.answers >= 0] - 1)


class _Rows:
    """Prompts on a runner that shares nothing."""

    def __init__(self, prompts: list[Ids], chosen: npt.NDArray[np.int64], packed: bool) -> None:
        self.prompts, self.chosen = [np.asarray(prompts[i], np.int32) for i in chosen], chosen
        lengths = [len(ids) for ids in self.prompts]
        self.tokens = sum(lengths) if packed else len(lengths) * max(lengths)

    def members(self, waiting: list[int]) -> list[int]:
        return [waiting[i] for i in self.chosen]

    def size(self) -> int:
        return self.tokens

    def prefix_tokens(self) -> int:
        return 0

    def hidden(self, runner: Any) -> torch.Tensor:
        lengths = np.array([len(ids) for ids in self.prompts], np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.concatenate(self.prompts)
        rows: torch.Tensor = runner.rows(ids, None, offsets, np.arange(len(lengths)), lengths - 1)
        return rows


_Batch = _Packed | _Rows


def _head_module(model: Any, head: str) -> tuple[str, torch.nn.Linear]:
    """The model's head and its name, for head="causal" or "classification"."""
    wanted = model.get_output_embeddings() if head == "causal" else None
    found = [
        (name, module)
        for name, module in model.named_children()
        if isinstance(module, torch.nn.Linear) and (wanted is None or module is wanted)
    ]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has no single linear head")
    return found[0]


def _logit_options(config: Any) -> dict[str, float]:
    """What families do to logits, by the names of their configs."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": float(getattr(config, "final_logit_softcapping", None) or 0.0)}


class Probes:
    """Short prompts of random tokens: what the model itself says of them, and how far a scorer is from it."""

    def __init__(self, config: Any, labels: int) -> None:
        usable = probe_tokens(config)
        generator = np.random.default_rng(0)
        # More tokens in all than rows are read, padding included: a layer that takes one for the other must not pass.
        shared = generator.choice(usable, 30)
        self.prompts = [np.concatenate([shared, generator.choice(usable, n)]) for n in (20, 25, 1)]
        self.labels = np.unique(np.linspace(0, labels - 1, min(labels, 16)).astype(np.int64))

    def expected(self, model: Any, head: str) -> npt.NDArray[np.float64]:
        """Return what the model itself says of the labels. Its head is cut to their rows, for good, and cast to it."""
        name, whole = _head_module(model, head)
        chosen = torch.from_numpy(self.labels).to(whole.weight.device)
        few = torch.nn.Linear(
            whole.in_features,
            len(chosen),
            whole.bias is not None,
            device=model.device,
            dtype=next(getattr(model, model.base_model_prefix).parameters()).dtype,
        )
        few.weight.copy_(whole.weight[chosen])
        if whole.bias is not None:
            few.bias.copy_(whole.bias[chosen])
        setattr(model, name, few)
        rows = []
        for ids in self.prompts:
            tensor = torch.from_numpy(ids)[None].to(model.device)
            logits = model(tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits
            rows.append((logits[0, -1] if head == "causal" else logits[0]).double().cpu().numpy())
        return np.stack(rows)

    def error(self, scorer: CausalScorer, expected: npt.NDArray[np.float64]) -> float:
        try:
            logits, _ = scorer.label_logits(self.prompts, self.labels)
        except RuntimeError as error:
            log.debug("probes failed: %s", error)
            return float("inf")
        return float(np.linalg.norm(logits - expected) / max(np.linalg.norm(expected), 1e-30))
