"""Attention masses of a decoder: loaded as far as it is read, proved against its own attention, run packed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.memory import CPU_DECODER_TOKENS
from fastrerank.engine.readouts import Masses, Reading
from fastrerank.engine.torch.backbone import PackedBackbone, causality
from fastrerank.engine.torch.decoder import find_layers, find_norm, fuse_layers, prune
from fastrerank.engine.torch.linear import packs
from fastrerank.engine.torch.loading import cast_parameters, load_model
from fastrerank.engine.torch.model import Model
from fastrerank.engine.torch.narrowing import narrow, release_unused
from fastrerank.engine.torch.placement import place_on
from fastrerank.engine.torch.probe import choose_runner, pack_when_equal, probe_tokens, relative_error
from fastrerank.engine.torch.row import CannotPack, Kept
from fastrerank.engine.usage import Cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.engine.torch.model import Where

__all__ = ["AttentionScorer", "LayerHead"]

log = logging.getLogger("fastrerank")

# A layer's number and a query head's, both from 0.
LayerHead = tuple[int, int]
# Relative difference from the masses of the model's own attention that passes when it is loaded. Attention moves with
# the exponential of the scores, which half precision rounds; reading a wrong row or head gives a difference of about 1.
_AGREES = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.3}


class AttentionScorer:
    """The attention that rows of a prompt pay to its keys: equals sums of transformers' `output_attentions`.

    No layer above the last one that is read runs, and of that layer only the keys of the heads that are read and the
    queries of the rows that are. One object may be called from many threads.

    Attributes:
        model: the model that is run.
        heads: (layer, head) pairs that are read, sorted; None for all.
        layers: layers that are loaded.
        head_count: query heads of a layer.
        max_length: tokens that the model's positions allow; None where its config names no limit.
        budget: tokens that the device's memory has room for; None on a CPU without a limit.
        kept_bytes: bytes that `keep` holds of each token.
    """

    def __init__(
        self,
        model: Model,
        weights: dict[int, torch.Tensor | None],
        *,
        heads: tuple[LayerHead, ...] | None,
        kept_bytes: int,
        limited: bool,
    ) -> None:
        self.model, self._weights, self.kept_bytes = model, weights, kept_bytes
        self.dtype, self.device, self.num_threads = model.dtype, model.device, model.num_threads
        self.budget = model.budget if limited else None
        config = model.runner.backbone.config.get_text_config()
        self.heads, self.layers = heads, int(config.num_hidden_layers)
        self.head_count = int(config.num_attention_heads)
        self.max_length = model.max_length

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        heads: Iterable[LayerHead] | None = None,
        *,
        early_exit: bool = True,
        **where: Unpack[Where],
    ) -> AttentionScorer:
        """Load a decoder through transformers, as far as the last layer of `heads`.

        Args:
            checkpoint: opened checkpoint of a decoder.
            heads: (layer, head) pairs to read, both from 0; None for all heads of all layers.
            early_exit: False runs all layers whole, for comparison.
            where: dtype, device, num_threads, memory_limit; see `Where`. Masses are float32 in all precisions.

        Raises ValueError for heads that the model does not have, for a model that cannot run packed (it says why), and
        for one whose masses differ from those of its own attention.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint                   # doctest: +SKIP
            >>> scorer = AttentionScorer.load(open_checkpoint("path"), [(13, 18), (14, 31)])   # doctest: +SKIP
        """
        ops.num_threads(where.get("num_threads"))  # checks it
        chosen = check_heads(heads, checkpoint.config)
        layers = None if chosen is None or not early_exit else max(layer for layer, _ in chosen) + 1
        model = load_model(checkpoint, "none", where.get("dtype", "float32"), layers=layers)
        return cls.from_model(model, chosen, early_exit=early_exit, **where)

    @classmethod
    def from_model(
        cls,
        backbone: Any,
        heads: Iterable[LayerHead] | None = None,
        *,
        early_exit: bool = True,
        **where: Unpack[Where],
    ) -> AttentionScorer:
        """Take over a transformers model without its head, in evaluation mode; the model is changed for good."""
        if causality(backbone) == {False}:
            raise ValueError(
                f"{type(backbone).__name__} is an encoder, and the methods that read attention (icr, qrhead, core) "
                "need a decoder, a causal language model; an encoder can serve cross-encoder, late-interaction or "
                "embedding"
            )
        dtype, place = where.get("dtype", "float32"), torch.device(where.get("device", "cpu"))
        config, kind = backbone.config.get_text_config(), getattr(torch, dtype)
        chosen = check_heads(heads, config.to_dict())
        cast_parameters(backbone, kind)
        backbone.to(place).eval()
        last = config.num_hidden_layers - 1 if chosen is None else max(layer for layer, _ in chosen)
        by_layer = _by_layer(chosen, config, place)
        probe = _probe(config)
        with torch.inference_mode(), place_on(where.get("num_threads"), place):
            expected = _eager_masses(backbone, probe, sorted(by_layer))
            runner, reason = choose_runner(backbone, dtype, None)
            if not runner.packed:
                raise ValueError(
                    f"{type(backbone).__name__} cannot be read: its attention does not run packed ({reason})"
                )
            try:
                stack, norm = find_layers(backbone), find_norm(backbone)
            except ValueError as error:
                raise ValueError(f"{type(backbone).__name__} cannot be read: {error}") from error
            setattr(backbone, norm, torch.nn.Identity())
            if early_exit:
                del stack[last + 1 :]
                config.num_hidden_layers = last + 1
                prune(stack[-1])
                _narrow_if_equal(runner, by_layer, probe, expected, dtype)
            if place.type == "cpu" and packs(kind):
                pack_when_equal(runner, dtype)
            fuse_layers(runner)
            try:
                error_ = _difference(runner, by_layer, probe, expected)
            except CannotPack as refusal:
                raise ValueError(f"{type(backbone).__name__} cannot be read: {refusal}") from refusal
            if error_ > _AGREES[dtype]:
                raise ValueError(
                    f"attention masses of {type(backbone).__name__} differ by {error_:.2g} from those of its own "
                    "attention: it computes attention in a way that its config does not name"
                )
            if early_exit:
                release_unused(runner, lambda: runner.read(probe.batch, Masses(probe, by_layer)))
            kept = Kept(probe.shared[: probe.first])
            alone = Reading.alone(kept.ids)
            runner.read(alone.batch, Masses(alone, by_layer, keep=kept))
        limited = place.type != "cpu" or where.get("memory_limit") is not None
        model = Model(runner, on_cpu=CPU_DECODER_TOKENS, noun="prompt", **where)
        return cls(model, by_layer, heads=chosen, kept_bytes=kept.nbytes // len(kept.ids), limited=limited)

    def masses(self, reading: Reading, before: Kept | None = None) -> tuple[npt.NDArray[np.float32], Cost]:
        """Return (masses, cost): float32 (end - begin,), the sum over the heads and rows that are read.

        Args:
            reading: the prompt and the rows and keys that are read.
            before: keys and values of the context, from `keep`; `reading.shared` must begin with its ids.

        Raises ValueError for a prompt beyond `max_length`, with ids outside the vocabulary, or another context.
        """
        if before is not None and not np.array_equal(reading.shared[: len(before.ids)], before.ids):
            raise ValueError("the prompt does not begin with the context whose keys were kept")
        mass, cost = self._run(Masses(reading, self._weights, before=before))
        return mass.numpy(), cost

    def masses_by_head(self, reading: Reading, each: Callable[[int, npt.NDArray[np.float32]], None]) -> Cost:
        """Hand each layer that is read, one after the other, with its heads' masses, float32 (H, end - begin)."""
        handed = Masses(reading, self._weights, each=lambda layer, mass: each(layer, mass.cpu().numpy()))
        return self._run(handed)[1]

    def keep(self, context: npt.NDArray[np.integer]) -> tuple[Kept, Cost]:
        """Run a context alone and return its keys and values, of the layers that are read and those below."""
        reading = Reading.alone(np.asarray(context, np.int64))
        kept = Kept(reading.shared)
        return kept, self._run(Masses(reading, self._weights, keep=kept))[1]

    def _run(self, readout: Masses) -> tuple[torch.Tensor, Cost]:
        longest = readout.reading.longest
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(f"the prompt has {longest} tokens, the model takes {self.max_length}")
        try:
            return self.model.run(readout.reading.batch, readout, on_host=True)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"a prompt of {readout.reading.tokens} tokens does not fit in the memory of {self.device}: give a "
                "smaller max_length, so that documents are ranked in windows"
            ) from error


def check_heads(heads: Iterable[LayerHead] | None, config: dict[str, Any]) -> tuple[LayerHead, ...] | None:
    """Return heads sorted, each once; ValueError naming one that a model of this config does not have, or none at all.

    Example:
        >>> check_heads([(1, 3), (0, 2)], {"num_hidden_layers": 2, "num_attention_heads": 4})
        ((0, 2), (1, 3))
    """
    if heads is None:
        return None
    found = []
    layers, count = config.get("num_hidden_layers"), config.get("num_attention_heads")
    for head in heads:
        if not isinstance(head, Sequence) or isinstance(head, str) or len(head) != 2:
            raise ValueError(f"heads must be pairs (layer, head), got {head!r}")
        pair = tuple(head)
        if any(isinstance(number, bool) or not isinstance(number, (int, np.integer)) for number in pair):
            raise ValueError(f"heads must be pairs of int, got {head!r}")
        for number, most, what in zip(pair, (layers, count), ("layers", "heads"), strict=True):
            if number < 0 or (most is not None and number >= most):
                raise ValueError(
                    f"heads: ({pair[0]}, {pair[1]}) is not in the model, which has {most} {what} numbered from 0"
                )
        found.append((int(pair[0]), int(pair[1])))
    if not found:
        raise ValueError("heads must name at least one (layer, head) pair; None reads all heads")
    return tuple(sorted(set(found)))


def _by_layer(heads: tuple[LayerHead, ...] | None, config: Any, device: torch.device) -> dict[int, torch.Tensor | None]:
    if heads is None:
        return dict.fromkeys(range(config.num_hidden_layers))
    weights: dict[int, torch.Tensor | None] = {}
    for layer in sorted({layer for layer, _ in heads}):
        row = torch.zeros(config.num_attention_heads, dtype=torch.float32)
        row[[head for at, head in heads if at == layer]] = 1.0
        weights[layer] = row.to(device)
    return weights


def _probe(config: Any) -> Reading:
    """A prompt of random tokens with two branches, longer than the model's window where that is small."""
    usable = probe_tokens(config)
    window = getattr(config, "sliding_window", None) or 0
    most = (getattr(config, "max_position_embeddings", None) or 512) - 20
    size = max(4, min(window + 9 if window <= 128 else 40, 40 if not window else 140, most))
    random = np.random.default_rng(0)
    context, alike, tail, other = (random.choice(usable, n) for n in (size, 4, 7, 3))
    reading = Reading.of(context, np.concatenate([alike, tail]), np.concatenate([alike, other]), 1, size)
    # All weights are positive: a difference of weights would be as small as the rounding of half precision.
    return Reading(reading.shared, reading.branches, reading.first, 1, size, np.abs(reading.weights) + np.float32(0.01))


def _eager_masses(backbone: Any, reading: Reading, layers: Sequence[int]) -> torch.Tensor:
    """What the model's own eager attention pays: float64 (layers, H, S), each branch in a forward of its own."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    total: torch.Tensor | None = None
    place = len(reading.shared) - reading.first
    for number, branch in enumerate(reading.branches):
        ids = torch.from_numpy(np.concatenate([reading.shared, branch]))[None].to(backbone.device)
        rows = backbone(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True).attentions
        weights = np.concatenate(
            [
                reading.weights[: len(reading.shared) - reading.first] * (number == 0),
                reading.weights[place : place + len(branch)],
            ]
        )
        place += len(branch)
        factor = torch.from_numpy(weights).double().to(backbone.device)
        parts = [
            torch.einsum("r,hrs->hs", factor, rows[layer][0, :, reading.first :, reading.begin : reading.end].double())
            for layer in layers
        ]
        total = torch.stack(parts) if total is None else total + torch.stack(parts)
    backbone.set_attn_implementation(before)
    assert total is not None
    return total


def _difference(
    runner: PackedBackbone, weights: dict[int, torch.Tensor | None], probe: Reading, expected: torch.Tensor
) -> float:
    """Relative difference of the masses from `expected`; of the heads that are read only. Raises CannotPack."""
    found: dict[int, torch.Tensor] = {}
    runner.read(probe.batch, Masses(probe, weights, each=found.__setitem__))
    sums = runner.read(probe.batch, Masses(probe, weights)).double()
    factors = [
        torch.ones(expected.shape[1], device=expected.device) if weights[layer] is None else weights[layer]
        for layer in sorted(weights)
    ]
    factor = torch.stack([f for f in factors if f is not None]).double()[:, :, None]
    ours = torch.stack([found[layer] for layer in sorted(found)]).double()
    by_head = relative_error(ours * factor, expected * factor)
    return max(by_head, relative_error(sums, (expected * factor).sum((0, 1))))


def _narrow_if_equal(
    runner: PackedBackbone, weights: dict[int, torch.Tensor | None], probe: Reading, expected: torch.Tensor, dtype: str
) -> None:
    """Narrow the last layer's projections to the heads that are read, unless that changes what they see."""
    last = weights[max(weights)]
    heads = range(expected.shape[1]) if last is None else last.nonzero()[:, 0].tolist()
    replaced = narrow(runner, heads)
    if not replaced:
        log.info("%s projects all of its last layer", type(runner.backbone).__name__)
    try:
        differs = _difference(runner, weights, probe, expected) > _AGREES[dtype]
        problem = "its keys depend on each other" if differs else ""
    except RuntimeError as error:  # the model's own code may fail on fewer heads than its config names; CannotPack too
        problem = f"{type(error).__name__}: {error}"
    if problem:
        log.info("%s projects all of its last layer: %s", type(runner.backbone).__name__, problem)
        for parent, name, linear in replaced:
            setattr(parent, name, linear)
