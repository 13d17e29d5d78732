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
    """`model` with 8-bit products in its layers: rows of inputs asymmetric on 0 .. u8_max - 1, weights by channel.

    Before rounding, input columns of values and of the feed-forward's first product are multiplied by the rms of their
    weights over the root of the reach of the norm they come from, those of its second product by the root of that rms;
    of these the eight with the largest weights (never more than an eighth of all) are not rounded.
    """
    norms = _norms_before(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"\blayers?\.\d+\.", name):
            weight, bias = module.weight.detach(), module.bias
            blocks = weight.chunk(3) if name.endswith("Wqkv") else [weight]
            value = name.endswith(("value", "v_lin"))
            products = []
            for i, block in enumerate(blocks):
                if value or i == 2 or name.endswith(("intermediate.dense", "lin1", "Wi")):
                    factor = block.square().mean(0).sqrt() / _reach(norms.get(name)) ** 0.5
                elif name.endswith(("output.dense", "lin2", "mlp.Wo")) and "attention" not in name:
                    factor = block.square().mean(0) ** 0.25
                    factor[block.abs().amax(0).topk(min(8, block.shape[1] // 8)).indices] = 0
                else:
                    factor = torch.ones(block.shape[1], dtype=block.dtype)
                products.append(_Product(block, factor, u8_max - 1))
            module.forward = _together(products, bias)  # type: ignore[method-assign]
    return model


def _norms_before(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layer norm whose output each linear module reads, by the module's name: found by running the model."""
    outputs, inputs, hooks = {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            hooks.append(module.register_forward_hook(lambda m, _, y: outputs.update({y.data_ptr(): (m, y)})))
        elif isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_hook(lambda _, x, __, n=name: inputs.update({n: x[0]})))
    with torch.no_grad():
        model(input_ids=torch.arange(5, 9)[None])
    for hook in hooks:
        hook.remove()
    return {name: outputs[x.data_ptr()][0] for name, x in inputs.items() if x.data_ptr() in outputs}


def _reach(norm: torch.nn.Module | None) -> torch.Tensor | float:
    if norm is None:
        return 1.0
    reach = 3 * norm.weight.detach().abs()
    return reach if norm.bias is None else reach + norm.bias.detach().abs()


class _Product:
    """x W^T, x times `factor` rounded to 8 bits; columns of factor 0 are taken as they are."""

    def __init__(self, weight: torch.Tensor, factor: torch.Tensor, levels: int) -> None:
        self.factor, self.levels = factor, levels
        self.whole = weight * (factor == 0)
        divided = torch.where(factor == 0, 0.0, weight / factor)
        scale = divided.abs().amax(1, keepdim=True) / 127
        self.weight = (divided / scale).round() * scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rounded = x * self.factor
        low, high = rounded.amin(-1, keepdim=True).clamp(max=0), rounded.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / self.levels
        zero = (-low / scale).round()
        return (((rounded / scale + zero).round() - zero) * scale) @ self.weight.T + x @ self.whole.T


def _together(products: list[_Product], bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([product(x) for product in products], -1)
        return y if bias is None else y + bias

    return forward
