"""Calls ops with wrong arguments, for AddressSanitizer too: `python tests/support/fuzzed_ops.py SEED CALLS [FOLDER]`.

Each call begins as a right one, of which none to three arguments are then spoilt: shape, dtype, strides, byte order,
alignment, values, or something else altogether. What is right then is TypeError or ValueError, or the reference's
result on what was passed. FOLDER holds builds of fastrerank._cpu and _cpu_tests to use in place of the installed ones.
"""

# ruff: noqa: ARG001, E501, RUF100, SIM105
from __future__ import annotations

import collections
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_bounds as bounds
import numpy as np

REFUSALS = (TypeError, ValueError, IndexError)  # the last of a layer that an encoder lacks
Arguments = dict[str, Any]
random = np.random.default_rng(0)


def chance(p: float) -> bool:
    return bool(random.random() < p)


def pick(*values: Any) -> Any:
    return values[random.integers(len(values))]


def size(most: int = 20) -> int:
    return int(random.integers(1, most + 1))


def normal(*shape: int) -> Any:
    return random.standard_normal(shape).astype(np.float32)


def offsets_of(tokens: int, least: int = 1) -> Any:
    cuts = sorted(
        random.choice(np.arange(1, tokens), size=min(tokens - 1, size(4)) if tokens > 1 else 0, replace=False)
    )
    return np.array([0, *cuts, tokens], np.int64)


def askew(array: Any) -> Any:
    """The same values at an odd address."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape) if array.nbytes else array.copy()
    view[...] = array
    return view


def spoilt_array(a: Any) -> Any:
    """What somebody might pass for an array: some of it is as good."""

    def with_value(value: float) -> Any:
        if not a.size or a.dtype.kind not in "fiu":
            return a
        changed = a.copy()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed.flat[random.integers(a.size)] = np.array(value).astype(a.dtype)
        return changed

    def as_dtype(dtype: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return a.astype(dtype)

    def read_only() -> Any:
        changed = a.copy()
        changed.flags.writeable = False
        return changed

    changes: list[Callable[[], Any]] = [
        lambda: as_dtype(pick("f8", "f2", "i8", "i4", "u1", "u2", "u8", "?", "c8", "O", "U8", "m8[s]")),
        lambda: as_dtype(a.dtype.newbyteorder()),
        lambda: a[..., None],
        lambda: a[None],
        lambda: a.reshape(-1),
        lambda: a.T,
        lambda: a[::-1],
        lambda: a[..., ::-1],
        lambda: a[::2],
        lambda: a[..., ::2],
        lambda: np.repeat(a, 2, -1)[..., ::2],
        lambda: np.asfortranarray(a),
        lambda: np.broadcast_to(a[:1], a.shape),
        lambda: a[:0],
        lambda: a[..., :0],
        lambda: a[:-1],
        lambda: a[..., :-1],
        lambda: np.concatenate([a, a]),
        lambda: np.concatenate([a, a], -1),
        lambda: np.array(1.0, a.dtype),
        lambda: a.tolist(),
        read_only,
        lambda: askew(a),
        lambda: np.ma.array(a),
        lambda: None,
        lambda: "text",
        lambda: 3,
        lambda: [[]],
        dict,
        lambda: with_value(pick(np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-40, -1, -(2.0**31), 2.0**31, 1e18)),
    ]
    try:
        return pick(*changes)()
    except (IndexError, ValueError, TypeError):
        return a


def spoilt_tensor(t: Any) -> Any:
    import torch

    if chance(0.4) and t.layout == torch.strided and t.device.type == "cpu" and not t.requires_grad:
        t = t.resolve_neg()
        array = spoilt_array(t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy())
        if not isinstance(array, np.ndarray):
            return array
        try:
            return torch.from_numpy(array.copy() if chance(0.3) else array)
        except (TypeError, ValueError):
            return array
    changes: list[Callable[[], Any]] = [
        lambda: t.to(pick(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)),
        lambda: t.transpose(0, -1),
        lambda: t[:1].expand(t.shape),
        lambda: t[..., :1].expand(t.shape),
        lambda: t[::2],
        lambda: torch.repeat_interleave(t, 2, -1)[..., ::2],
        lambda: torch.repeat_interleave(t, 2, 0)[::2],
        lambda: t[:0],
        lambda: t[..., :0],
        lambda: t[:-1],
        lambda: torch.cat([t, t]),
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: torch._neg_view(t) if t.is_floating_point() else -t,
        lambda: t.requires_grad_() if 0 else t.unsqueeze(0),
        lambda: t.flatten(),
        lambda: torch.nn.Parameter(t),
        lambda: t.numpy(),
        lambda: torch.tensor(1.0),
    ]
    try:
        return pick(*changes)()
    except (IndexError, RuntimeError, TypeError):
        return t


def spoilt(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return spoilt_array(value)
    if type(value).__module__ == "torch":
        return spoilt_tensor(value)
    others = (
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        1 << 20,
        2**31 - 1,
        2**31,
        -(2**63),
        2**63,
        2**70,
        0.5,
        np.nan,
        np.inf,
        -1.0,
        1e300,
        1e-320,
        "text",
        "float32",
        b"x",
        [1],
        (),
        object(),
        np.int32(3),
        np.float64(0.5),
        1j,
    )
    return pick(*others)


def plain(value: Any) -> Any:
    """As the reference takes it: float64 arrays, integers as they are."""
    if type(value).__module__.startswith("torch"):
        import torch

        value = value.detach().resolve_neg()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
        del torch
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    value = np.asarray(value)
    return value.astype(np.float64) if value.dtype.kind == "f" else value


def tame(*values: Any) -> bool:
    """Whether the values are finite and sums of their products are."""
    arrays = [np.asarray(plain(value)) for value in values if value is not None]
    return all(
        array.dtype.kind in "iufb" and np.isfinite(array).all() and (np.abs(array) < 1e6).all() for array in arrays
    )


def near(found: Any, expected: Any, bound: Any) -> None:
    """Assert equal shapes, and values within `bound` of float64's where those are finite, equal where they are not."""
    found, expected = plain(found), np.asarray(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    room = np.broadcast_to(bound + 2.0**-23 * np.abs(np.where(finite, expected, 0)) + 1e-38, expected.shape)
    beyond = np.abs(found - np.where(finite, expected, 0)) > room
    beyond &= finite
    if beyond.any():
        worst = int(np.argmax(np.where(beyond, np.abs(found - expected) / room, 0)))
        raise AssertionError(
            f"{beyond.sum()} of {expected.size}: {found.flat[worst]}, expected {expected.flat[worst]} "
            f"within {room.flat[worst]:.3g}"
        )


# Each returns the arguments of a right call, what calls it, and what checks a result by the arguments.
Case = tuple[Arguments, Callable[..., Any], Callable[[Any, Arguments], None]]


def nothing(_: Any, __: Arguments) -> None:
    """The call has not crashed."""


def max_sim() -> Case:
    from fastrerank import ops
    from fastrerank.ops import reference

    width, tokens = size(70), size(60)
    given = {
        "query": normal(size(40), width),
        "tokens": normal(tokens, width),
        "offsets": offsets_of(tokens),
        "threads": pick(None, 1, 2),
    }

    def check(found: Any, a: Arguments) -> None:
        if tame(a["query"], a["tokens"]):
            query, tokens = plain(a["query"]), plain(a["tokens"])
            near(found, reference.max_sim(query, tokens, np.asarray(a["offsets"])), bounds.max_sim(query, tokens))

    return given, lambda query, tokens, offsets, threads: ops.max_sim(query, tokens, offsets, threads=threads), check


def cur_topk() -> Case:
    from fastrerank import ops
    from fastrerank.ops import reference

    width, count, rows = size(70), size(100), size(5)
    given = {
        "queries": normal(rows, width),
        "vectors": normal(width, count),
        "storage": pick("float32", "bfloat16", "int8"),
        "scales": None,
        "k": size(12),
        "threads": pick(None, 1, 2),
        "exclude": pick(None, random.integers(0, count, 3), random.integers(-1, count, (rows, 3))),
    }
    if given["storage"] == "int8" and chance(0.5):
        given["scales"] = pick("item", "anchor")

    def call(queries: Any, vectors: Any, storage: Any, scales: Any, k: Any, threads: Any, exclude: Any) -> Any:
        items = ops.cur_pack(vectors, storage, scales=scales)
        return (*ops.cur_topk(queries, items, k, exclude=exclude, threads=threads), items)

    def check(found: Any, a: Arguments) -> None:
        if tame(a["queries"], a["vectors"]) and a["exclude"] is None:
            queries, vectors = plain(a["queries"]), plain(found[2].vectors())
            _, scores = reference.cur_topk(queries, vectors, int(a["k"]))
            near(found[1], scores, bounds.dots(queries, vectors).max(1, initial=0, keepdims=True))

    return given, call, check


def packed() -> Case:
    from fastrerank import ops

    width, count, storage = size(40), size(70), pick("float32", "bfloat16", "int8")
    items = ops.cur_pack(normal(width, count), storage)
    given = {
        "data": items.data,
        "scale": items.scale,
        "storage": storage,
        "width": width,
        "count": count,
        "ids": random.integers(0, count, 5),
        "more": 0.1 * normal(width, size()),
        "query": normal(2, width),
    }

    def call(data: Any, scale: Any, storage: Any, width: Any, count: Any, ids: Any, more: Any, query: Any) -> Any:
        again = ops.PackedItems(data, scale, storage=storage, width=width, count=count)
        ops.cur_topk(query, again, 3)
        try:
            again.vectors(ids)
        except IndexError:
            pass
        return again.append(more).vectors(np.arange(count))

    return given, call, nothing


def attention() -> Case:
    import torch

    from fastrerank import ops
    from fastrerank.ops import reference

    rows, keys, kv_heads, width = size(40), size(40), size(2), pick(8, 16, 24, 64, 7)
    dtype = pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    tensor = lambda *shape: torch.from_numpy(normal(*shape)).to(dtype)  # noqa: E731
    lo = random.integers(0, keys + 1, rows).astype(np.int32)
    hi = np.maximum(lo, random.integers(0, keys + 1, rows)).astype(np.int32)
    given = {
        "q": tensor(rows, kv_heads * size(2), width),
        "k": tensor(keys, kv_heads, width),
        "v": tensor(keys, kv_heads, width),
        "lo": torch.from_numpy(lo),
        "hi": torch.from_numpy(hi),
        "plo": None,
        "phi": None,
        "scale": pick(None, 0.5),
        "softcap": pick(0.0, 3.0),
        "out": None,
        "backend": None,
    }
    if chance(0.3):
        given["plo"] = torch.zeros(rows, dtype=torch.int32)
        given["phi"] = torch.from_numpy((lo * random.random()).astype(np.int32))
    if chance(0.2):
        given["out"] = torch.empty_like(given["q"])

    def check(found: Any, a: Arguments) -> None:
        one = [plain(a[name]) for name in ("q", "k", "v", "lo", "hi", "plo", "phi")]
        if (
            tame(*one[:3])
            and (a["scale"] is None or 1e-3 < a["scale"] < 1e3)
            and (not a["softcap"] or a["softcap"] > 1e-3)
        ):
            wanted, _ = reference.attention(*one, scale=a["scale"], softcap=a["softcap"])
            near(found, wanted, bounds.attention(*one[:3], a["scale"], str(found.dtype).removeprefix("torch.")))

    return given, lambda q, k, v, lo, hi, plo, phi, **rest: ops.attention(q, k, v, lo, hi, plo, phi, **rest), check


def attention_mass() -> Case:
    import torch

    from fastrerank import ops
    from fastrerank.ops import reference

    rows, keys, kv_heads, width = size(30), size(60), size(2), pick(8, 16, 24, 64, 7)
    heads = kv_heads * size(2)
    lo = random.integers(0, keys + 1, rows).astype(np.int32)
    hi = np.maximum(lo, random.integers(0, keys + 1, rows)).astype(np.int32)
    given = {
        "q": torch.from_numpy(normal(rows, heads, width)),
        "k": torch.from_numpy(normal(keys, kv_heads, width)),
        "lse": torch.from_numpy(3 + normal(rows, heads)),
        "lo": torch.from_numpy(lo),
        "hi": torch.from_numpy(hi),
        "row_weight": torch.from_numpy(normal(rows)),
        "head_weight": None,
        "scale": pick(None, 0.5),
        "softcap": pick(0.0, 3.0),
        "per_head": chance(0.3),
        "out": None,
        "backend": None,
    }
    if not given["per_head"] and chance(0.5):
        given["head_weight"] = torch.from_numpy(normal(heads))
    if chance(0.2):
        given["out"] = torch.zeros((heads, keys) if given["per_head"] else keys)

    def check(found: Any, a: Arguments) -> None:
        names = ("q", "k", "lse", "lo", "hi", "row_weight", "head_weight")
        one = {name: plain(a[name]) for name in names}
        usual = (a["scale"] is None or 1e-3 < a["scale"] < 10) and (not a["softcap"] or a["softcap"] > 1e-3)
        if tame(one["q"], one["k"], one["lse"], one["row_weight"], one["head_weight"]) and usual and a["out"] is None:
            more = {"scale": a["scale"], "softcap": a["softcap"], "per_head": bool(a["per_head"])}
            wanted = reference.attention_mass(**one, **more)
            if (np.abs(wanted) < 1e6).all():
                sizes = {name: None if one[name] is None else np.abs(one[name]) for name in names[-2:]}
                magnitude = reference.attention_mass(**one | sizes, **more)
                near(found, wanted, bounds.attention_mass(magnitude, one["q"], one["k"], one["lse"], a["scale"]))

    return (
        given,
        lambda q, k, lse, lo, hi, row_weight, **rest: ops.attention_mass(q, k, lse, lo, hi, row_weight, **rest),
        check,
    )


def label_logits() -> Case:
    import torch

    from fastrerank import ops
    from fastrerank.ops import reference

    rows, labels, width = size(30), size(5), size(100)
    dtype = pick(torch.float32, torch.bfloat16, torch.float16)
    given = {
        "hidden": torch.from_numpy(normal(rows, width)).to(dtype),
        "weight": torch.from_numpy(normal(labels, width)),
        "norm": pick(None, "rms", "layer"),
        "norm_weight": None,
        "norm_bias": None,
        "eps": 1e-5,
        "bias": None,
        "scale": 1.0,
        "softcap": 0.0,
        "return_order": True,
        "backend": None,
    }
    for name, many in (("norm_weight", width), ("norm_bias", width), ("bias", labels)):
        if chance(0.5):
            given[name] = torch.from_numpy(normal(many))

    def check(found: Any, a: Arguments) -> None:
        tensors = {name: plain(a[name]) for name in ("hidden", "weight", "norm_weight", "norm_bias", "bias")}
        if tame(*tensors.values()) and a["eps"] == 1e-5 and a["scale"] == 1.0 and a["softcap"] == 0.0 and width > 1:
            wanted = reference.label_logits(**tensors, norm=a["norm"], eps=a["eps"])
            gamma = np.ones(1) if tensors["norm_weight"] is None else tensors["norm_weight"]
            rows, error = bounds.normed(tensors["hidden"], a["norm"], gamma, a["eps"])
            beta = 0 if a["norm"] is None or tensors["norm_bias"] is None else np.abs(tensors["norm_bias"])
            weight = np.abs(tensors["weight"]).T
            bias = 0 if tensors["bias"] is None else np.abs(tensors["bias"])
            bound = bounds.dots(np.abs(rows) + beta, weight) + error @ weight + 4 * bounds.U * bias
            near(found[0] if a["return_order"] else found, wanted[0] if isinstance(wanted, tuple) else wanted, bound)

    return given, lambda hidden, weight, **rest: ops.label_logits(hidden, weight, **rest), check


def on_gpus() -> Case:
    """Ops that Triton alone has: on CPU tensors all calls are refused."""
    import torch

    from fastrerank.ops import _gated, _norm_rows, _rotary

    x, cos = torch.from_numpy(normal(1, 2, 3, 8)), torch.from_numpy(normal(1, 3, 8))
    given = {"x": x, "cos": cos, "weight": cos[0, 0], "name": "silu", "norm": "rms", "eps": 1e-5}

    def call(x: Any, cos: Any, weight: Any, name: Any, norm: Any, eps: Any) -> None:
        for op in (
            lambda: _rotary.rotary(x, x, cos, cos),
            lambda: _gated.gated(x, name),
            lambda: _norm_rows.norm_rows(x, norm, weight, None, eps),
        ):
            try:
                found = op()
            except REFUSALS:
                continue
            if not all(tensor.numel() == 0 for tensor in (found if isinstance(found, tuple) else [found])):
                raise AssertionError("a CPU tensor was taken")

    return given, call, nothing


def linear() -> Case:
    from fastrerank import _cpu, _cpu_tests

    rows, inputs, outputs = size(40), size(130), size(70)
    stored = random.integers(0, 2**15, (outputs, inputs)).astype(np.uint16) & 0x3FFF
    weight = pick(normal(outputs, inputs), normal(outputs, inputs).astype(np.float16), stored)
    given = {
        "x": normal(rows, inputs),
        "w": weight,
        "bias": pick(None, normal(outputs)),
        "dtype": pick("float32", "bfloat16", "int8"),
        "activation": pick("identity", "relu"),
        "isa": pick(*_cpu.levels()),
    }

    def check(found: Any, a: Arguments) -> None:
        w = a["w"]
        if w.dtype == np.uint16:
            w = (w.astype(np.uint32) << 16).view(np.float32)
        if tame(a["x"], w, a["bias"]):
            x, w, bias = plain(a["x"]), plain(w), plain(a["bias"])
            wanted = x @ w.T + (0 if bias is None else bias)
            wanted = np.maximum(wanted, 0) if a["activation"] == "relu" else wanted
            near(found, wanted, bounds.linear(x, w, bias, a["dtype"]))

    return (
        given,
        lambda x, w, bias, dtype, activation, isa: _cpu_tests.linear(x, w, bias, dtype, activation, isa),
        check,
    )


def rows() -> Case:
    from fastrerank import _cpu, _cpu_tests

    count, width = size(20), size(100)
    given = {
        "x": normal(count, width),
        "gamma": normal(width),
        "beta": pick(None, normal(width)),
        "eps": 1e-5,
        "factor": pick(None, np.abs(normal(width))),
        "isa": pick(*_cpu.levels()),
    }

    def call(x: Any, gamma: Any, beta: Any, eps: Any, factor: Any, isa: Any) -> Any:
        _cpu_tests.quantise(x, factor, isa)
        return _cpu_tests.layer_norm(x, gamma, beta, eps, isa)

    def check(found: Any, a: Arguments) -> None:
        if tame(a["x"], a["gamma"], a["beta"]) and a["eps"] == 1e-5:
            rows, error = bounds.normed(plain(a["x"]), "layer", plain(a["gamma"]), 1e-5)
            beta = np.zeros(1) if a["beta"] is None else plain(a["beta"])
            near(found, rows + beta, error + 4 * bounds.U * (np.abs(rows) + np.abs(beta)))

    return given, call, check


def encoder() -> Case:
    from fastrerank import _cpu

    hidden, inner, words, dtype = 32, 48, 30, pick("float32", "bfloat16", "int8")
    config = {
        "hidden": hidden,
        "layers": 1,
        "heads": 2,
        "head_dim": 16,
        "intermediate": inner,
        "embedding": hidden,
        "vocabulary": words,
        "positions": 64,
        "types": 2,
        "position_offset": 0,
        "pad_id": -1,
        "pre_norm": False,
        "gated": False,
        "activation": "gelu",
        "eps": 1e-12,
        "window": [-1],
        "rope": [-1],
        "attention_scale": 0.25,
        "precision": dtype,
        "precise_layers": 0,
    }
    tokens = size(60)
    given = {
        "word": normal(words, hidden),
        "position": normal(64, hidden),
        "type": normal(2, hidden),
        "gamma": np.ones(hidden, np.float32),
        "beta": np.zeros(hidden, np.float32),
        "square": normal(hidden, hidden),
        "up": normal(inner, hidden),
        "bias": normal(hidden),
        "factor": np.ones(hidden, np.float32),
        "columns": np.arange(2, dtype=np.int32),
        "strip": normal(hidden, 2),
        "head": normal(3, hidden),
        "layer": 0,
        "ids": random.integers(0, words, tokens).astype(np.int32),
        "types": random.integers(0, 2, tokens).astype(np.int32),
        "offsets": offsets_of(tokens),
        "readout": pick("first", "last", "mean", "tokens"),
        "threads": pick(1, 2),
    }

    def call(**a: Any) -> Any:
        made = _cpu.Encoder(config, pick(*_cpu.levels()))
        made.set_tables(a["word"], a["position"], a["type"])
        for layer, name in ((-1, "embedding"), (a["layer"], "attention"), (a["layer"], "output")):
            made.set_norm(layer, name, a["gamma"], a["beta"])
        for name in "qkvo":
            made.set_linear(a["layer"], name, a["square"], a["bias"])
        made.set_linear(a["layer"], "up", a["up"], None)
        made.set_linear(a["layer"], "down", np.ascontiguousarray(np.asarray(given["up"]).T), a["bias"])
        if dtype == "int8" and chance(0.3):
            made.set_factor(a["layer"], "v", a["factor"])
            made.set_strip(a["layer"], a["columns"], a["strip"])
        if chance(0.5):
            made.add_dense(a["head"], None, "tanh")
        return made.forward(a["ids"], a["types"], a["offsets"], a["readout"], a["threads"])

    return given, call, nothing


def others() -> Case:
    from fastrerank import _cpu_tests

    given = {"scores": normal(50).tolist(), "k": 5, "batch": 16, "blocks": 2, "dtype": "float32"}

    def call(scores: Any, k: Any, batch: Any, blocks: Any, dtype: Any) -> None:
        _cpu_tests.reservoir_topk(scores, k, batch, blocks)

    return given, call, nothing


KINDS = [max_sim, cur_topk, packed, linear, rows, encoder, others, attention, attention_mass, label_logits, on_gpus]


def run(seed: int, calls: int) -> collections.Counter[str]:
    """Make the calls; AssertionError naming those whose outcome is neither a refusal nor right."""
    global random
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    kinds = KINDS if importlib.util.find_spec("torch") else KINDS[:7]
    for number in range(calls):
        random = np.random.default_rng((seed, number))
        kind = kinds[number % len(kinds)]
        given, call, check = kind()
        for _ in range(pick(0, 1, 1, 1, 2, 3)):
            name = pick(*given)
            given[name] = spoilt(given[name])
        named = f"seed {seed}, call {number}: {kind.__name__}({', '.join(f'{k}={_said(v)}' for k, v in given.items())})"
        if "FUZZ_SHOWS" in os.environ:  # what a crash was in
            print(named, flush=True)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                found = call(**given)
        except REFUSALS:
            outcomes[f"{kind.__name__} refused"] += 1
            continue
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}; {named}")
            continue
        try:
            check(found, given)
        except Exception as error:
            wrong.append(f"wrong: {type(error).__name__}: {str(error)[:300]}; {named}")
            continue
        outcomes[f"{kind.__name__} right"] += 1
    assert not wrong, f"{len(wrong)} of {calls} calls:\n" + "\n".join(wrong[:10])
    return outcomes


def _said(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}/{value.strides}"
    if type(value).__module__.startswith("torch") and hasattr(value, "dtype"):
        return f"{value.dtype}{tuple(value.shape)}"
    return repr(value)[:60]


if __name__ == "__main__":
    if len(sys.argv) > 3:
        for name in ("_cpu", "_cpu_tests"):
            (built,) = Path(sys.argv[3]).glob(f"{name}.*")
            spec = importlib.util.spec_from_file_location(f"fastrerank.{name}", built)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[f"fastrerank.{name}"] = module
            spec.loader.exec_module(module)
    for what, count in sorted(run(int(sys.argv[1]), int(sys.argv[2])).items()):
        print(f"{what}: {count}")
