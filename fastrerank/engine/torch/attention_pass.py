"""Attention masses read off a packed forward: chosen rows, chosen heads, and no layer above the last one that is read.

A prompt is a context C and an instruction I, followed by one or two branches: the query Q, and a content-free query A
in its place. They lie in one row of tokens: C and I, then Q, then A, which stand at the same positions and do not see
each other. The mass of a key is the sum over heads and read rows of the attention that the rows pay it, each row with a
weight of its own; with the weights of `Reading.of` it is the mean over the rows of the prompt with Q less that of the
prompt with A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.engine.batch import PackedBatch, Segment, pack
from fastrerank.engine.torch.backbone import CannotPack, PackedBackbone, running
from fastrerank.engine.torch.decoder import WHOLE, ChosenRows, KeysKept, find_layers
from fastrerank.engine.torch.upload import upload

__all__ = ["Kept", "Reading", "narrow", "read", "release_unused"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt and what is read of it.

    Attributes:
        shared: int64 (n,), context and instruction.
        branches: what follows in each branch, not empty; no branches where the instruction is read alone.
        first: the first row of `shared` that is read, at most n; the rows of branches are read all.
        begin, end: the keys whose mass is wanted, begin <= end <= first.
        weights: float32 (n - first + lengths of the branches,), of each row that is read.
    """

    shared: Ids
    branches: tuple[Ids, ...]
    first: int
    begin: int
    end: int
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        context: npt.NDArray[np.integer],
        tail: npt.NDArray[np.integer],
        other: npt.NDArray[np.integer] | None,
        begin: int,
        end: int,
    ) -> Reading:
        """Read the mean over the rows of `tail` behind `context`, less that over the rows of `other`, if there is one.

        What the tails begin with alike is computed once.
        """
        alike = len(tail) if other is None else _common(tail, other)
        shared = np.concatenate([context, tail[:alike]]).astype(np.int64)
        rows, branches = [np.full(alike, 1.0 / len(tail))], []
        for part, sign in ((tail, 1.0), *(() if other is None else ((other, -1.0),))):
            if sign < 0:
                rows[0] -= 1.0 / len(part)
            if len(part) > alike:
                branches.append(part[alike:].astype(np.int64))
                rows.append(np.full(len(part) - alike, sign / len(part)))
        weights = np.concatenate(rows).astype(np.float32)
        return cls(shared, tuple(branches), len(context), begin, end, weights)

    @property
    def longest(self) -> int:
        """Positions of the longest branch with what stands before it."""
        return len(self.shared) + max(map(len, self.branches), default=0)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the network."""
        return len(self.shared) + sum(map(len, self.branches))

    def pack(self) -> PackedBatch:
        """Return the packed row: `shared`, then the branches."""
        return pack([Segment(self.shared, causal=True), *(Segment(b, prefix=0, causal=True) for b in self.branches)])


class Kept:
    """Keys and values of a context, layer by layer: (C, Hkv, D) tensors; of the last layer that is read the keys."""

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


class _AllRead(Exception):
    """Ends a forward behind the last layer that is read."""


class _ReadRows(ChosenRows):
    """A packed row whose read rows' masses are handed to `take(layer, q, k, lse, window, scale, softcap)`.

    `base` is the number of keys that stand before the row's tokens and are kept; `chosen` counts from there.
    """

    def __init__(
        self,
        table: torch.Tensor,
        windows: tuple[int, ...],
        alone: int,
        chosen: torch.Tensor,
        count: int,
        layers: frozenset[int],
        take: Callable[..., None],
        *,
        before: Kept | None = None,
        keep: Kept | None = None,
    ) -> None:
        super().__init__(table, windows, alone, chosen)
        self.count, self.layers, self.take = count, layers, take
        self.before, self.keep = before, keep
        self.last = max(layers)
        self.layer = -1

    def answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float,
    ) -> torch.Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.keys_only:  # of the last layer that is read
            self.layer += 1
            self._check_last()
            if self.keep is not None:
                self.keep.keys.append(k[: len(self.keep.ids)].contiguous())
            if not self.count:
                raise _AllRead
            k = self._behind(k, None if self.before is None else self.before.keys)
            self.kept = (k, k)
            raise KeysKept
        if self.kept is not None:
            k, rows = self.kept[0], self.chosen[: self.count]
            _, lse = self.attend(q[: self.count], k, k, window, scale, softcap, rows=rows, return_lse=True)
            self.take(self.layer, q[: self.count], k, lse, window, scale, softcap)
            raise _AllRead
        self.layer += 1
        if self.keep is not None:
            size = len(self.keep.ids)
            self.keep.keys.append(k[:size].contiguous())
            self.keep.values.append(v[:size].contiguous())
        if self.before is not None:
            k, v = self._behind(k, self.before.keys), self._behind(v, self.before.values)
        if not self.count and self.layer == self.last:
            raise _AllRead
        if self.layer not in self.layers or not self.count:
            return self.attend(q, k, v, window, scale, softcap)[0][None]
        out, lse = self.attend(q, k, v, window, scale, softcap, return_lse=True)
        assert lse is not None
        rows = self.chosen[: self.count]
        self.take(self.layer, q[rows], k, lse[rows], window, scale, softcap)
        if self.layer == self.last:
            raise _AllRead
        return out[None]

    def _behind(self, new: torch.Tensor, kept: Sequence[torch.Tensor] | None) -> torch.Tensor:
        return new if kept is None else torch.cat([kept[self.layer], new])

    def _check_last(self) -> None:
        if self.layer != self.last:
            raise CannotPack(
                f"the model's last layer is its attention call {self.layer}, not {self.last}: a layer calls it "
                "more than once, or not at all"
            )


def read(
    runner: PackedBackbone,
    reading: Reading,
    heads: Mapping[int, torch.Tensor | None],
    *,
    before: Kept | None = None,
    keep: Kept | None = None,
    each: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Run a packed decoder as far as the last layer in `heads`, and return the masses of the keys, float32 (S,).

    Args:
        runner: the model; its last layer may be pruned and narrowed.
        reading: what to read; S is `reading.end - reading.begin`.
        heads: of each layer that is read, float32 (H,) weights of its heads, or None for all of them.
        before: keys and values of the context's tokens, which then do not pass through the network again.
        keep: takes up keys and values of its tokens, which `reading.shared` begins with.
        each: is handed the layer and its heads' masses, float32 (H, S), one layer after the other; then zeros return.

    Nothing of size (rows, keys) exists; a layer's keys and values are let go of when the next one begins.
    """
    device, skipped = runner.device, 0 if before is None else len(before.ids)
    batch, total = reading.pack(), reading.tokens
    count = total - reading.first
    rows = np.arange(reading.first, total)
    if device.type == "cpu":
        batch = batch.padded_to(skipped + -(-(total - skipped) // WHOLE) * WHOLE)
    table = upload(np.ascontiguousarray(runner.table(batch)[:, skipped:]), device)
    chosen = np.resize(rows - skipped, -(-count // WHOLE) * WHOLE if device.type == "cpu" else count)
    weights = upload(reading.weights, device)
    size = reading.end - reading.begin
    mass = torch.zeros(size, dtype=torch.float32, device=device)
    spans: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        lse: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float,
    ) -> None:
        if window not in spans:
            spans[window] = tuple(upload(ends, device) for ends in _seen(batch, reading, window))  # type: ignore[assignment]
        keys = k[reading.begin : reading.end]
        if each is not None:
            by_head = ops.attention_mass(
                q, keys, lse, *spans[window], weights, scale=scale, softcap=softcap, per_head=True
            )
            each(layer, by_head)
        else:
            ops.attention_mass(
                q, keys, lse, *spans[window], weights, head_weight=heads[layer], scale=scale, softcap=softcap, out=mass
            )

    row = _ReadRows(
        table,
        runner.windows,
        max(0, batch.alone - skipped),
        upload(chosen, device),
        count,
        frozenset(heads),
        take,
        before=before,
        keep=keep,
    )
    try:
        runner.forward(row)
    except _AllRead:
        return mass
    raise CannotPack(f"the model ended after {row.layer + 1} attention calls, before layer {row.last}")


def _seen(batch: PackedBatch, reading: Reading, window: int | None) -> tuple[npt.NDArray[np.int32], ...]:
    """The keys in [begin, end) that each read row sees, counted from `begin`: int32 (R,) and (R,)."""
    spans = (batch.lo, batch.hi, batch.plo, batch.phi) if window is None else batch.windowed(window)
    lo, hi, plo, phi = (ends[reading.first : reading.tokens] for ends in spans)
    inside = np.arange(reading.first, reading.tokens) < len(reading.shared)
    first, last = np.where(inside, lo, plo), np.where(inside, hi, phi)
    size = reading.end - reading.begin
    first = np.clip(first - reading.begin, 0, size)
    return first.astype(np.int32), np.maximum(first, np.clip(last - reading.begin, 0, size)).astype(np.int32)


def _common(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> int:
    most = min(len(a), len(b))
    different = a[:most] != b[:most]
    return int(different.argmax()) if different.any() else most


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
        if isinstance(row, _ReadRows):
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
