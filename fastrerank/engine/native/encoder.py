"""The native CPU encoder: a checkpoint's weights packed for this CPU, and one packed forward. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.checkpoints.tensors import Span, Tensor, Tensors
from fastrerank.checkpoints.weight_files import Arena, copies_weights
from fastrerank.engine.expected_weights import check_body, check_unread, values
from fastrerank.engine.families import Family, Fused, family_of
from fastrerank.engine.heads import DenseStep, Head, NormStep
from fastrerank.engine.native import int8_scaling
from fastrerank.ops._encoder import make_encoder

__all__ = ["DTYPES", "NativeEncoder", "body_prefix"]

DTYPES = ("float32", "bfloat16", "int8")

# Largest table of word embeddings, in bytes, that is read whole. FASTRERANK_COPY_WEIGHTS=1 reads every table whole.
_WHOLE_TABLE = 8 << 20

# Attention works on whole vectors of head dimensions; narrower heads are padded with zero weights.
_HEAD_MULTIPLE = 16


_Norm = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]  # gamma, beta


@dataclass
class _Linear:
    """A layer's weight (n, k) as stored under `name`, or already float32, and its bias."""

    name: str
    weight: npt.NDArray[Any]
    bias: npt.NDArray[np.float32] | None

    def float32(self) -> npt.NDArray[np.float32]:
        if self.weight.dtype == np.uint16:  # bfloat16, the upper half of a float32
            return (self.weight.astype(np.uint32) << 16).view(np.float32)
        return self.weight.astype(np.float32, copy=False)


def _padded(n: int) -> int:
    return -(-n // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def whole_table_bytes() -> float:
    """Return the size up to which a table of word embeddings is read into memory when its model is loaded.

    Example:
        >>> whole_table_bytes() >= 8 << 20
        True
    """
    return float("inf") if copies_weights() else _WHOLE_TABLE


def body_prefix(family: Family, tensors: Tensors) -> str:
    """Return what the body's weights carry in this file: the family's base name in a task model, else nothing."""
    for prefix in (family.base, ""):
        if prefix + family.word in tensors:
            return prefix
    raise ValueError(
        f"the weights hold neither {family.base + family.word!r} nor {family.word!r}: "
        f"this is not a {family.model_type} checkpoint, whatever its config.json says"
    )


class NativeEncoder:
    """An encoder and its head on CPU kernels: equals the transformers model's forward on each document alone.

    Args:
        checkpoint: opened checkpoint of a family in `families.FAMILIES`.
        head: rows to read and the layers on top of them.
        dtype: "float32" (the reference's result), "bfloat16" or "int8" (per-token activations, per-channel weights).
            The head is float32 in all of them.
        num_threads: threads of one call; None for the default.
        precise_layers: of int8, the last layers that run in bfloat16.

    A document's result is bitwise the same whatever else is in the call and however many threads work on it.
    One object may be called from many threads.

    Raises ValueError for an unsupported family or variant, missing weights, or weights that are NaN.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        tensors: Tensors,
        head: Head,
        *,
        dtype: str,
        num_threads: int | None = None,
        precise_layers: int = 0,
    ) -> None:
        self.family = family
        self.dtype = dtype
        self.readout = head.readout
        self.num_threads = num_threads
        self._precise_layers = precise_layers if dtype == "int8" else 0
        self._path = checkpoint.transformer_path
        self._head_dim = _padded(family.head_size)
        prefix = body_prefix(family, tensors)
        read = check_body(self._path, family, tensors, prefix) | head.names
        check_unread(self._path, family, tensors, prefix, read, task=bool(head.names))
        word = tensors[prefix + family.word]
        self._encoder = make_encoder(self._config(family, word, dtype))
        self._load_body(tensors, prefix, word)
        for step in head.steps:
            if isinstance(step, DenseStep):
                self._encoder.add_dense(step.weight, step.bias, step.activation)
            elif isinstance(step, NormStep):
                self._encoder.add_norm(step.gamma, step.beta, step.eps)
            else:
                self._encoder.add_normalize()
        tensors.check()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        head: Head,
        *,
        dtype: str = "float32",
        num_threads: int | None = None,
        precise_layers: int = 0,
    ) -> NativeEncoder:
        """Open the checkpoint's weights and pack them.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint                  # doctest: +SKIP
            >>> encoder = NativeEncoder.load(open_checkpoint("path"), Head("mean"))           # doctest: +SKIP
        """
        with checkpoint.tensors() as tensors:
            family = family_of(checkpoint.config)
            return cls(
                checkpoint, family, tensors, head, dtype=dtype, num_threads=num_threads, precise_layers=precise_layers
            )

    @property
    def width(self) -> int:
        """Values per document, or per token where tokens are read."""
        return int(self._encoder.output_width)

    @property
    def isa(self) -> str:
        """Instruction-set level that this model was packed for."""
        return str(self._encoder.isa)

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights, without the word embeddings, whose rows are read as texts have them."""
        return int(self._encoder.weight_bytes)

    def forward(
        self,
        ids: npt.NDArray[np.int32],
        type_ids: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Run N documents of T tokens in all, packed one after the other.

        Args:
            ids: int32 (T,) token ids. type_ids: int32 (T,) or None for zeros.
            offsets: int64 (N+1,); document d is ids[offsets[d]:offsets[d+1]], at least one token.

        Returns float32 (N, width), or (T, width) where tokens are read. Raises ValueError for an id outside the
        vocabulary or a document longer than the model takes.

        Example:
            >>> encoder.forward(np.array([101, 102], np.int32), None, np.array([0, 2]))  # doctest: +SKIP
        """
        threads = ops.num_threads(self.num_threads)
        result: npt.NDArray[np.float32] = self._encoder.forward(ids, type_ids, offsets, self.readout, threads)
        return result

    def _config(self, family: Family, word: Tensor, dtype: str) -> dict[str, Any]:
        vocabulary, embedding = word.shape
        tables = list(dict.fromkeys(family.layer_types)) if family.rope_theta else []
        types = family.layer_types or ("full_attention",) * family.layers
        return {
            "hidden": family.hidden,
            "layers": family.layers,
            "heads": family.heads,
            "head_dim": self._head_dim,
            "intermediate": family.intermediate,
            "embedding": embedding,
            "vocabulary": vocabulary,
            "positions": family.positions,
            "types": family.types,
            "position_offset": family.position_offset,
            "pad_id": family.pad_id,
            "pre_norm": family.pre_norm,
            "gated": family.gated,
            "activation": family.activation,
            "eps": family.eps,
            "window": [family.window if kind == "sliding_attention" else -1 for kind in types],
            "rope": [tables.index(kind) if tables else -1 for kind in types],
            "attention_scale": family.head_size**-0.5,
            "precision": dtype,
            "precise_layers": self._precise_layers,
        }

    def _load_body(self, tensors: Tensors, prefix: str, word: Tensor) -> None:
        family, encoder = self.family, self._encoder
        tables = {}
        for key in ("position", "type"):
            name = getattr(family, key)
            tables[key] = tensors[prefix + name].float32() if name else None
        self._set_word_table(word, tables["position"], tables["type"])
        for kind in dict.fromkeys(family.layer_types) if family.rope_theta else ():
            encoder.add_rope(family.rope_theta[kind], family.head_size // 2)
        norms = {(-1, "embedding"): self._set_norm(tensors, -1, "embedding", prefix + family.embedding_norm)}
        if family.final_norm:
            self._set_norm(tensors, -1, "final", prefix + family.final_norm)
        if family.projection:
            self._set_linear(-1, "projection", self._linear(tensors, -1, family.projection, prefix, {}, Arena(0)))
        room = self._room(tensors, prefix)
        for i in range(family.layers):
            for slot, norm in family.norms.items():
                if i > 0 or slot != "attention" or family.first_norm:
                    norms[i, slot] = self._set_norm(tensors, i, slot, prefix + norm.format(i))
            self._set_layer(tensors, i, prefix, norms, room)

    def _set_word_table(self, word: Tensor, position: Any, types: Any) -> None:
        """Give the encoder the word table: a large one row by row, when a text first has a row's token.

        Few of its rows are ever read, so a large one stays in the file; but not as a mapping, which a truncated file
        would turn into SIGBUS and a rewritten one into another model's rows.
        """
        source = word.source
        if word.dtype == "F64" or not isinstance(source, Span) or source.end - source.start <= whole_table_bytes():
            self._encoder.set_tables(values(word), position, types)
            return
        self._encoder.set_tables(None, position, types)
        fd, size, changed = source.file.noted
        self._encoder.set_word_rows(fd, str(source.file.path), source.start, size, changed, word.dtype)

    def _set_norm(self, tensors: Tensors, layer: int, slot: str, name: str) -> _Norm:
        # Old conversions from TensorFlow call a norm's weight gamma and its bias beta.
        gamma, beta = (
            next((tensors[f"{name}.{kind}"].float32() for kind in kinds if f"{name}.{kind}" in tensors), None)
            for kinds in (("weight", "gamma"), ("bias", "beta"))
        )
        assert gamma is not None  # check_body has seen it
        self._encoder.set_norm(layer, slot, gamma, beta)
        return gamma, beta

    def _balanced(self, layer: int) -> bool:
        return self.dtype == "int8" and layer < self.family.layers - self._precise_layers

    def _room(self, tensors: Tensors, prefix: str) -> Arena:
        """Room for what is read at once: the matrices of a layer that is balanced, else the largest of them."""
        names = {part.name if isinstance(part, Fused) else part for part in self.family.layer.values()}
        stored = (tensors[f"{prefix}{name.format(0)}.weight"] for name in names)
        sizes = [math.prod(tensor.shape) * (2 if tensor.dtype in ("F16", "BF16") else 4) + 64 for tensor in stored]
        return Arena(sum(sizes) if self._balanced(0) else max(sizes))

    def _set_layer(
        self, tensors: Tensors, i: int, prefix: str, norms: dict[tuple[int, str], _Norm], room: Arena
    ) -> None:
        stored: dict[str, npt.NDArray[Any]] = {}
        room.reset()
        if self._balanced(i):
            linears = {
                slot: self._linear(tensors, i, name, prefix, stored, room) for slot, name in self.family.layer.items()
            }
            self._balance(linears, i, norms)
            for slot, linear in linears.items():
                self._set_linear(i, slot, linear)
            return
        before = ""
        for slot, part in self.family.layer.items():
            name = part.name if isinstance(part, Fused) else part
            if name != before:  # slots of a fused matrix follow one another
                stored.clear()
                room.reset()
                before = name
            self._set_linear(i, slot, self._linear(tensors, i, part, prefix, stored, room))

    def _balance(self, linears: dict[str, _Linear], i: int, norms: dict[tuple[int, str], _Norm]) -> None:
        """Move what int8 rounding cannot hold out of the inputs of v, up, gate and down; see `int8_scaling`.

        Queries and keys read their input as it is: they need no more, and share one rounding of it.
        """
        before, between = ("attention", "output") if self.family.pre_norm else ("output", "attention")
        source = norms.get((i if self.family.pre_norm else i - 1, before))
        if source is None and i == 0 and not self.family.projection:
            source = norms[-1, "embedding"]
        for slots, norm, power in ((("v",), source, 1.0), (("up", "gate"), norms.get((i, between)), 1.0)):
            parts = [linears[slot] for slot in slots if slot in linears]
            for part in parts:
                part.weight = part.float32()
            factor = int8_scaling.column_factors(
                [part.weight for part in parts], int8_scaling.spread(*norm) if norm else None, power
            )
            self._scale(parts, i, slots[0], factor)
        down = linears["down"]
        down.weight = down.float32()
        columns = int8_scaling.strip_columns(down.weight)
        factor = int8_scaling.column_factors([down.weight], None, 0.5)
        factor[columns] = 0
        if len(columns):
            self._encoder.set_strip(i, columns, np.ascontiguousarray(down.weight[:, columns]))
        self._scale([down], i, "down", factor)

    def _scale(self, parts: list[_Linear], layer: int, slot: str, factor: npt.NDArray[np.float32]) -> None:
        divisor = np.divide(np.float32(1), factor, where=factor > 0, out=np.zeros_like(factor))
        for part in parts:
            part.weight = part.weight * divisor
        self._encoder.set_factor(layer, slot, factor)

    def _linear(
        self,
        tensors: Tensors,
        layer: int,
        name: str | Fused,
        prefix: str,
        stored: dict[str, npt.NDArray[Any]],
        room: Arena,
    ) -> _Linear:
        """The weight and bias of a slot; `stored` keeps what was read, as several slots share a fused matrix."""
        part = name if isinstance(name, Fused) else Fused(name, 0, 1)
        full = prefix + part.name.format(layer)
        if f"{full}.weight" not in stored:
            stored[f"{full}.weight"] = values(tensors[f"{full}.weight"], room)
        if f"{full}.bias" in tensors and f"{full}.bias" not in stored:
            stored[f"{full}.bias"] = tensors[f"{full}.bias"].float32()
        bias = stored.get(f"{full}.bias")
        return _Linear(
            f"{full}.weight", _block(stored[f"{full}.weight"], part), None if bias is None else _block(bias, part)
        )

    def _set_linear(self, layer: int, slot: str, linear: _Linear) -> None:
        weight, bias = linear.weight, linear.bias
        if self._head_dim != self.family.head_size:
            weight, bias = self._pad_heads(slot, weight, bias)
        try:
            self._encoder.set_linear(layer, slot, weight, bias)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error} ({linear.name})") from None

    def _pad_heads(
        self, slot: str, weight: npt.NDArray[Any], bias: npt.NDArray[np.float32] | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        heads, size, padded = self.family.heads, self.family.head_size, self._head_dim
        if slot in ("q", "k", "v"):
            wide = np.zeros((heads, padded, weight.shape[1]), weight.dtype)
            wide[:, :size] = weight.reshape(heads, size, -1)
            if bias is not None:
                long = np.zeros((heads, padded), np.float32)
                long[:, :size] = bias.reshape(heads, size)
                bias = long.reshape(-1)
            return wide.reshape(heads * padded, -1), bias
        if slot == "o":
            wide = np.zeros((weight.shape[0], heads, padded), weight.dtype)
            wide[:, :, :size] = weight.reshape(-1, heads, size)
            return wide.reshape(weight.shape[0], -1), bias
        return weight, bias


def _block(array: npt.NDArray[Any], part: Fused) -> npt.NDArray[Any]:
    rows = array.shape[0] // part.parts
    return array[part.index * rows : (part.index + 1) * rows]
