"""Whether a model runs packed, or padded: what its class says, and a proof on a few tokens when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank.engine.batch import Batch
from fastrerank.engine.readouts import Tokens
from fastrerank.engine.torch.backbone import PackedBackbone, why_not_packed
from fastrerank.engine.torch.linear import fuse_feed_forwards, pack_linears, packs
from fastrerank.engine.torch.padded import PaddedBackbone, PaddedModel
from fastrerank.engine.torch.placement import place_on
from fastrerank.engine.torch.row import CannotPack

__all__ = ["AGREES", "choose_runner", "pack_when_equal", "probe_tokens", "relative_error", "runner_of", "when_equal"]

log = logging.getLogger("fastrerank")

# Largest relative difference between documents together and alone that passes when a model is loaded. It is far above
# rounding (1e-6, 2e-2), and far below the effect of a wrong position or of attention to a neighbour.
AGREES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


def choose_runner(backbone: Any, dtype: str, packed: bool | None, whole: bool = False) -> tuple[Any, str]:
    """Return a packed or a padded runner of the model, and why it is the latter ("" if it is not).

    What a model's class says is proved on three short documents of random tokens, together against one at a time: a
    family may combine tokens in ways that no flag tells of. Where even padding changes what a model computes, its
    runner's `pads` is False: then only documents of equal length may share a batch.

    Args:
        backbone: model in evaluation mode, on its device.
        dtype: its precision.
        packed: False for a padded runner; None and True for a packed one if the model can.
        whole: whether it is a task model with its head, which cannot run packed.
    """
    runner: Any = PaddedModel(backbone) if whole else PaddedBackbone(backbone)
    reason = "engine='padded' was asked for" if packed is False else None if whole else why_not_packed(backbone)
    documents = _Documents(backbone)
    with torch.inference_mode():
        try:
            expected = torch.cat([documents.states(runner, [number]) for number in range(3)])
        except KeyError as error:  # a name in the config that transformers does not know, whatever the tokens are
            raise ValueError(
                f"{type(backbone).__name__} cannot run with this config.json: {type(error).__name__}: {error}"
            ) from error
        except Exception as error:  # a model may want tokens that random text lacks
            runner.pads = False
            return runner, _join(reason, f"it cannot be tried on random tokens ({type(error).__name__}: {error})")
        if reason is None and not whole:
            before = backbone.config._attn_implementation
            candidate = PackedBackbone(backbone)
            try:
                error_ = relative_error(documents.states(candidate, [0, 1, 2]), expected)
                reason = f"packed hidden states differ from single documents' by {error_:.2g}"
            except CannotPack as refusal:
                error_, reason = float("inf"), str(refusal)
            if error_ <= AGREES[dtype]:
                return candidate, ""
            backbone.set_attn_implementation(before)
        error_ = relative_error(documents.states(runner, [0, 1, 2]), expected)
    runner.pads = error_ <= AGREES[dtype]
    if not runner.pads:
        reason = _join(reason, f"padding changes what it computes by {error_:.2g}")
    return runner, reason or ""


def runner_of(
    backbone: Any, dtype: str, packed: bool | None, *, whole: bool = False, num_threads: int | None = None
) -> tuple[Any, str]:
    """Return the runner and the reason of `choose_runner`.

    On a CPU the model's linear layers then run on packed kernels, if these give the same results.
    """
    device = next(backbone.parameters()).device
    with place_on(None, device):
        runner, reason = choose_runner(backbone, dtype, packed, whole)
    if device.type == "cpu" and packs(getattr(torch, dtype)):
        with torch.inference_mode(), place_on(num_threads, device):
            pack_when_equal(runner, dtype)
    return runner, reason


def probe_tokens(config: Any) -> npt.NDArray[np.int64]:
    """Return token ids below 1000, int64, without the padding and end tokens. Probes draw random prompts from them."""
    taken = (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))
    return np.array([i for i in range(min(int(config.vocab_size), 1000)) if i not in taken])


def pack_when_equal(runner: Any, dtype: str) -> None:
    """Put a CPU model's linear and feed-forward layers on packed kernels, unless it then computes something else.

    A model that reads a layer's weight itself, rather than calling the layer, keeps torch's layers.
    """
    documents = _Documents(runner.backbone)

    def states() -> torch.Tensor:
        return torch.cat([documents.states(runner, [number]) for number in range(3)])

    def problem() -> str:
        try:
            return "" if relative_error(states(), expected) <= AGREES[dtype] else "results differ"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    try:
        expected = states()
    except Exception as error:  # a model may want tokens that random text lacks
        log.debug("linear layers stay torch's: the model cannot be tried on random tokens (%s)", error)
        return
    name = type(runner.backbone).__name__
    replaced = pack_linears(runner.backbone)
    if found := problem():
        log.info("%s keeps torch's linear layers: %s", name, found)
        for parent, attribute, layer in replaced:
            setattr(parent, attribute, layer)
        return
    put_back = fuse_feed_forwards(runner.backbone)
    if found := problem():
        log.info("%s keeps its feed-forward layers in parts: %s", name, found)
        put_back()


def when_equal(runner: Any, change: Callable[[], Callable[[], None]]) -> str:
    """Change a packed model, unless it then computes something else; returns what keeps it as it was, or "".

    `change` returns what undoes it.
    """
    documents = _Documents(runner.backbone)
    bound = AGREES[str(next(runner.backbone.parameters()).dtype).removeprefix("torch.")]

    def states() -> torch.Tensor:
        return torch.cat([documents.states(runner, [number]) for number in range(3)])

    with torch.inference_mode(), place_on(None, runner.device):
        try:
            expected = states()
        except Exception as error:  # a model may want tokens that random text lacks
            return f"the model cannot be tried on random tokens ({type(error).__name__}: {error})"
        put_back = change()
        try:
            error_ = relative_error(states(), expected)
            problem = "" if error_ <= bound else f"results differ by {error_:.2g}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    if problem:
        put_back()
    return problem


def _join(reason: str | None, more: str) -> str:
    more = f"{more}: only documents of equal length share a batch"
    return more if reason is None else f"{reason}; {more}"


class _Documents:
    """Three documents of random tokens; one is longer than the model's window, where that is small."""

    def __init__(self, backbone: Any) -> None:
        config = backbone.config.get_text_config()
        end = getattr(config, "eos_token_id", None)
        usable = probe_tokens(config)
        window = getattr(config, "sliding_window", None) or 0
        longest = window + 9 if window <= 128 else 20
        longest = max(1, min(longest, (getattr(config, "max_position_embeddings", None) or 512) - 4))
        texts = [np.random.default_rng(n).choice(usable, n) for n in (3, longest, 2)]
        if isinstance(end, int) and 0 <= end < config.vocab_size:  # some classifiers look for the end of the text
            texts = [np.append(text, end) for text in texts]
        self._batch = Batch.of_ids(texts)

    def states(self, runner: Any, chosen: list[int]) -> torch.Tensor:
        """What `runner` computes of the chosen documents together: token vectors, or logits of a whole model."""
        rows: torch.Tensor = runner.read(self._batch.take(np.array(chosen)), Tokens())
        return rows.double()


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the difference's root mean square over the expected's; where both overflow alike, that of the rest."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(ours)):
        return float("inf")
    ours, expected = ours[finite], expected[finite]
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30)) if len(ours) else 0.0
