"""transformers on one sequence at a time, in several precisions, as the reference for the native encoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import tiny
import torch

# One token, both sides of every tile and vector, and the most that the models take.
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, tiny.MAX_LENGTH - 1, tiny.MAX_LENGTH)


def documents(family: str, lengths: Any = LENGTHS, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ids (no special ones), type ids and offsets of documents of the given lengths."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, tiny.VOCABULARY, sum(lengths)).astype(np.int32)
    types = random.integers(0, 2, len(ids)).astype(np.int32)
    if tiny.is_roberta(family):
        types[:] = 0
    return ids, types, np.cumsum([0, *lengths])


def body(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, model.base_model_prefix)


def run(model: torch.nn.Module, family: str, ids: np.ndarray, types: np.ndarray, offsets: np.ndarray) -> Any:
    """(logits (N, labels), token vectors (T, D)) in float64, every document alone."""
    logits, tokens = [], []
    for begin, end in pairwise(offsets):
        inputs = {"input_ids": torch.from_numpy(ids[None, begin:end]).long()}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if not family.startswith(("distilbert", "modernbert")):
            inputs["token_type_ids"] = torch.from_numpy(types[None, begin:end]).long()
        with torch.inference_mode():
            logits.append(model(**inputs).logits.double().numpy())
            tokens.append(body(model)(**inputs).last_hidden_state[0].double().numpy())
    return np.concatenate(logits), np.concatenate(tokens)


@cache
def results(family: str, dtype: str, labels: int = 3) -> Any:
    """`run` of the tiny model of seed 0 in a torch dtype on `documents(family)`."""
    return run(tiny.build(family, labels).to(getattr(torch, dtype)), family, *documents(family))


@cache
def int8_results(family: str, u8_max: int, labels: int = 3) -> Any:
    """The same in float64, with every product of the layers quantised as the native encoder states it."""
    return run(quantise(tiny.build(family, labels).double(), u8_max), family, *documents(family))


def quantise(model: torch.nn.Module, u8_max: int) -> torch.nn.Module:
    """`model` with 8-bit products in its layers: rows of inputs asymmetric on 0 .. u8_max - 1, weights by channel."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"\blayers?\.\d+\.", name):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
            module.forward = _quantised(module.forward, u8_max - 1)  # type: ignore[method-assign]
    return model


def _quantised(forward: Callable[[torch.Tensor], torch.Tensor], levels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / levels
        zero = (-low / scale).round()
        return forward(((x / scale + zero).round() - zero) * scale)

    return apply
