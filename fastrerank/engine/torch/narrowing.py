"""The last layer of a decoder whose attention is read: it projects what is read, and frees what is never called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from fastrerank.engine.torch.backbone import PackedBackbone
from fastrerank.engine.torch.decoder import find_layers
from fastrerank.engine.torch.row import running

__all__ = ["narrow", "release_unused"]


class _Narrow(torch.nn.Module):
    """A projection of the last layer that is read: the rows of the output that some pass needs, zeros elsewhere.

    Args:
        linear: the projection.
        parts: rows of its weight that the pass over all tokens needs ("keys"), and the one over read rows ("queries").
    """

    def __init__(self, linear: torch.nn.Linear, parts: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.places = {name: list(rows) for name, rows in parts.items() if len(rows)}
        for name, rows in self.places.items():
            some = torch.nn.Linear(linear.in_features, len(rows), linear.bias is not None, device="meta")
            some.weight = torch.nn.Parameter(linear.weight.detach()[rows], requires_grad=False)
            if linear.bias is not None:
                some.bias = torch.nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
            setattr(self, name, some)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros((*x.shape[:-1], self.out_features))
        row = running()
        wanted = None
        if row is not None and row.masses is not None:
            wanted = "keys" if row.keys_only else "queries"
        for name, rows in self.places.items():
            if wanted in (None, name):
                out[..., rows[0] : rows[-1] + 1] = self._part(name, rows, x)
        return out

    def _part(self, name: str, rows: list[int], x: torch.Tensor) -> torch.Tensor:
        part: torch.Tensor = getattr(self, name)(x)
        if len(rows) == rows[-1] + 1 - rows[0]:
            return part
        whole = part.new_zeros((*part.shape[:-1], rows[-1] + 1 - rows[0]))
        whole[..., [row - rows[0] for row in rows]] = part
        return whole


def narrow(runner: PackedBackbone, heads: Sequence[int]) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """Make the model's last layer project the keys that query heads `heads` read, and nothing that is not read.

    Its projections must be q_proj, k_proj and v_proj, or one qkv_proj with these one after the other; others stay
    whole. Returns what was replaced, as (parent, name, module): `setattr(parent, name, module)` puts it back.
    """
    config = runner.backbone.config.get_text_config()
    count = int(config.num_attention_heads)
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []

    def put(parent: torch.nn.Module, name: str, parts: Mapping[str, Sequence[int]]) -> None:
        linear = getattr(parent, name)
        replaced.append((parent, name, linear))
        setattr(parent, name, _Narrow(linear, parts))

    for module in find_layers(runner.backbone)[-1].modules():
        linears = {n: c for n, c in module.named_children() if type(c) is torch.nn.Linear}
        if {"q_proj", "k_proj", "v_proj"} <= linears.keys():
            size = linears["q_proj"].out_features // count
            needed = _key_heads(heads, count, linears["k_proj"].out_features // size)
            put(module, "q_proj", {"queries": range(linears["q_proj"].out_features)})
            put(module, "k_proj", {"keys": _rows_of(needed, size)})
            put(module, "v_proj", {})
        elif "qkv_proj" in linears:
            groups = int(getattr(config, "num_key_value_heads", None) or count)
            size = linears["qkv_proj"].out_features // (count + 2 * groups)
            keys = [count * size + row for row in _rows_of(_key_heads(heads, count, groups), size)]
            put(module, "qkv_proj", {"queries": range(count * size), "keys": keys})
    return replaced


def _key_heads(heads: Sequence[int], count: int, groups: int) -> list[int]:
    """The key heads that query heads read, of `groups` that `count` query heads share."""
    return sorted({head // (count // groups) for head in heads})


def _rows_of(heads: Sequence[int], size: int) -> list[int]:
    return [head * size + i for head in heads for i in range(size)]


def release_unused(runner: PackedBackbone, run: Callable[[], Any]) -> None:
    """Free the weights of the last layer's modules that `run`, which reads a prompt, never calls."""
    layer = find_layers(runner.backbone)[-1]
    called: set[torch.nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda m, _: called.add(m)) for module in layer.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if not any(module in called for module in child.modules()):
                setattr(parent, name, cast("torch.nn.Module", torch.nn.Identity()))
