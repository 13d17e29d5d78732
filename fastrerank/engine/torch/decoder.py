"""A packed decoder that computes what its readout needs: chosen rows of the last layer, before the final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from fastrerank.engine.batch import Batch
from fastrerank.engine.readouts import Readout, Rows
from fastrerank.engine.torch.backbone import WHOLE, PackedBackbone
from fastrerank.engine.torch.gpu_layers import fuse_on_gpu
from fastrerank.engine.torch.linear import fuse_gated
from fastrerank.engine.torch.loading import release_after_reading
from fastrerank.engine.torch.placement import upload
from fastrerank.engine.torch.row import PassEnded, Row, running
from fastrerank.engine.torch.row_norms import fuse_norm, read_norm

__all__ = ["PackedDecoder", "find_layers", "find_norm", "fuse_layers", "prune"]

# Rows of a feed-forward layer at a time on a CPU: its intermediate rows stay in the cache, and memory stays small.
FEED_FORWARD_ROWS = 512


def find_layers(backbone: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the list of decoder layers; ValueError where the model has no list of `num_hidden_layers`."""
    config: Any = backbone.config
    count = config.get_text_config().num_hidden_layers
    found = [m for m in backbone.children() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ValueError(f"{type(backbone).__name__} has no single list of {count} layers")
    return found[0]


def find_norm(backbone: torch.nn.Module) -> str:
    """Return the name of the norm after the last layer; ValueError where there is not exactly one."""
    names = [name for name, module in backbone.named_children() if "norm" in type(module).__name__.lower()]
    if len(names) != 1:
        raise ValueError(f"{type(backbone).__name__} has {len(names)} norms beside its layers, expected one")
    return names[0]


class PackedDecoder(PackedBackbone):
    """A packed backbone whose last layer and final norm are left to the readout.

    Of the last layer keys and values are computed for all tokens, everything else for the rows that are read. The
    final norm is taken out: `norm` says what it was.

    Args:
        packed: the backbone, for which packing has been proved.

    Attributes:
        norm: the final norm.
        prunes: whether the last layer computes the chosen rows only.
    """

    def __init__(self, packed: PackedBackbone) -> None:
        super().__init__(packed.backbone)
        stack, name = find_layers(self.backbone), find_norm(self.backbone)
        width = int(self.backbone.config.get_text_config().hidden_size)
        self.norm = read_norm(getattr(self.backbone, name), width)
        setattr(self.backbone, name, torch.nn.Identity())
        self.prunes = True
        prune(stack[-1])
        for module in stack[-1].modules():
            if isinstance(getattr(module, "q_proj", None), torch.nn.Module):
                _skip_queries(module.q_proj)  # type: ignore[arg-type]
        fuse_layers(self)

    def read(self, batch: Batch, readout: Readout) -> torch.Tensor:
        """Return what `PackedBackbone.read` returns, before the final norm; the last layer computes rows that are read.

        Rows come in the model's dtype.
        """
        if not isinstance(readout, Rows):
            return super().read(batch, readout)
        packed = batch.pack(self.causal)
        rows = (packed.starts + readout.at)[readout.at >= 0]
        count = len(rows)
        if self.device.type == "cpu":
            packed = packed.padded_to(-(-len(packed) // WHOLE) * WHOLE)
            rows = np.resize(rows, -(-count // WHOLE) * WHOLE)
        table, chosen = upload(self.table(packed), self.device), upload(rows, self.device)
        row = Row(
            table,
            self.windows,
            packed.alone,
            chosen=chosen if self.prunes else None,
            embeddings=packed.embeddings,
        )
        states = self.forward(row)
        return states[:count] if self.prunes else states[chosen[:count]]


def fuse_layers(packed: PackedBackbone) -> None:
    """Fuse a decoder's layers: what `fuse_on_gpu` fuses, or on a CPU norms and, over few rows, feed-forward layers."""
    if packed.device.type != "cpu":
        fuse_on_gpu(packed)
        return
    release_after_reading(packed.backbone.get_input_embeddings())
    for module in packed.backbone.modules():
        fuse_norm(module)
    for layer in find_layers(packed.backbone):
        feed_forward = getattr(layer, "mlp", None)
        if not isinstance(feed_forward, torch.nn.Module) or fuse_gated(feed_forward):
            continue
        if hasattr(feed_forward, "down_proj"):
            _in_blocks(feed_forward)


def prune(layer: torch.nn.Module) -> None:
    """Make a layer compute only a row's chosen rows, after a first run that ends at the keys and values of all."""
    whole = layer.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        row = running()
        if row is None or row.chosen is None:
            return whole(hidden_states, *args, **kwargs)
        tokens, chosen = hidden_states.shape[1], row.chosen

        def take(value: Any) -> Any:
            if torch.is_tensor(value) and value.ndim > 1 and value.shape[1] == tokens:
                return value[:, chosen]
            if isinstance(value, tuple):
                return tuple(take(one) for one in value)
            return value

        row.keys_only = True
        try:
            whole(hidden_states, *args, **kwargs)
        except PassEnded:
            if row.kept is None:  # nothing is read beyond the keys, so the whole pass ends
                raise
            row.keys_only = False
        return whole(take(hidden_states), *map(take, args), **{name: take(value) for name, value in kwargs.items()})

    layer.forward = forward


def _skip_queries(projection: torch.nn.Module) -> None:
    """Leave out the queries of a run that ends at the keys."""
    whole, width = projection.forward, cast("int", projection.out_features)

    def forward(x: torch.Tensor) -> torch.Tensor:
        row = running()
        if row is not None and row.keys_only:
            return x.new_zeros((*x.shape[:-1], width))
        result: torch.Tensor = whole(x)
        return result

    projection.forward = forward


def _in_blocks(feed_forward: torch.nn.Module) -> None:
    whole: Callable[..., Any] = feed_forward.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or x.shape[0] != 1 or x.shape[1] <= FEED_FORWARD_ROWS:
            return whole(x, *args, **kwargs)
        return torch.cat([whole(part) for part in x.split(FEED_FORWARD_ROWS, 1)], 1)

    feed_forward.forward = forward
