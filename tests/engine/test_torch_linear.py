"""Linear layers of torch models on packed CPU products: equal to torch's at every size, or taken back."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch

import fastrerank._cpu as _cpu
from fastrerank import ops
from fastrerank.engine.torch import probe as torch_probe
from fastrerank.engine.torch.linear import PackedLinear, fuse_feed_forwards, fuse_gated, pack_linears, packs
from fastrerank.ops._tensors import share_openmp

SIZES = [(32, 64), (384, 96), (33, 48), (64, 17), (7, 5), (1, 1)]  # (inputs, outputs)


LEVELS = ops.cpu_info()["supported"]
KINDS = [(level, "float32") for level in LEVELS]
KINDS += [(level, "bfloat16") for level in LEVELS if level in ops.BFLOAT16_LEVELS]


@pytest.fixture(params=KINDS, ids="-".join)
def dtype(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A precision, with a level in force that multiplies it."""
    level, name = request.param
    ops.set_isa(level)
    yield getattr(torch, name)
    ops.set_isa(None)


def test_error_is_at_most_twice_torchs(dtype: Any) -> None:
    # Over all sizes and numbers of rows together: a single tiny product of torch may be right by luck, and for a
    # product of one row its libraries have other routines, whose sums are shorter.
    torch.manual_seed(1)
    errors: list[list[Any]] = [[], []]
    for rows, (inputs, outputs) in product([1, 7, 24, 25, 100, 217], SIZES):
        linear = torch.nn.Linear(inputs, outputs, bias=outputs != 48).to(dtype)
        x = torch.randn(rows, inputs).to(dtype)
        with torch.inference_mode():
            wide = [None if t is None else t.double() for t in (x, linear.weight, linear.bias)]
            exact = torch.nn.functional.linear(*wide)
            for kind, layer in enumerate((PackedLinear(linear), linear)):
                result = layer(x)
                assert result.dtype == dtype
                errors[kind].append((result - exact).ravel())
    ours, plain = (torch.cat(parts).square().mean().sqrt() for parts in errors)
    assert ours <= 2 * plain


def test_rows_are_bitwise_their_own(dtype: Any) -> None:
    linear = PackedLinear(torch.nn.Linear(64, 48).to(dtype))
    x = torch.randn(230, 64).to(dtype)
    before = torch.get_num_threads()
    with torch.inference_mode():
        expected = linear(x)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x), expected)
        torch.set_num_threads(before)
        for begin, end in ((0, 1), (5, 30), (100, 230)):
            assert torch.equal(linear(x[begin:end]), expected[begin:end])


def test_any_shape_and_stride(dtype: Any) -> None:
    linear = torch.nn.Linear(32, 16).to(dtype)
    packed = PackedLinear(linear)
    x = torch.randn(3, 40, 64).to(dtype)
    with torch.inference_mode():
        for view in (x[..., :32], x[..., ::2], x.transpose(0, 1)[..., 32:], x[0, 0, :32], x[:0, :, :32]):
            assert packed(view).shape == linear(view).shape
            assert torch.equal(packed(view), packed(view.contiguous()))
    assert packed.weight.dtype == dtype


def test_what_it_refuses() -> None:
    packed = PackedLinear(torch.nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"x must be torch.float32 \(..., 8\), got torch.float64 \(2, 8\)"):
        packed(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch.float32 \(2, 7\)"):
        packed(torch.zeros(2, 7))
    broken = torch.nn.Linear(8, 4)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        PackedLinear(broken)


class Reader(torch.nn.Module):
    """A model of two layers; `direct` reads the second one's weight itself."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.direct = direct
        self.config = SimpleNamespace(vocab_size=50, get_text_config=lambda: self.config)

    def read(self, batch: Any, _readout: Any) -> Any:
        x = self.first(torch.nn.functional.one_hot(torch.from_numpy(batch.ids).long() % 8, 8).float())
        return torch.nn.functional.linear(x, self.second.weight) if self.direct else self.second(x)


@pytest.mark.parametrize("direct", [False, True])
def test_a_model_that_reads_weights_itself_keeps_torchs_layers(direct: bool) -> None:
    model = Reader(direct)
    runner = SimpleNamespace(backbone=model, read=model.read)
    with torch.inference_mode():
        torch_probe.pack_when_equal(runner, "float32")
    kinds = {type(model.first), type(model.second)}
    assert kinds == ({torch.nn.Linear} if direct else {PackedLinear})


def test_a_layer_that_stands_twice_is_packed_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    model["b"] = model["a"]
    model["other"] = torch.nn.Bilinear(2, 2, 2)
    replaced = pack_linears(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], PackedLinear)
    assert isinstance(model["other"], torch.nn.Bilinear)
    for parent, name, layer in replaced:
        setattr(parent, name, layer)
    assert type(model["b"]) is torch.nn.Linear


def test_half_precision_without_kernels_stays_torchs() -> None:
    assert not packs(torch.float16)
    ops.set_isa("portable")
    try:
        assert packs(torch.float32)
        assert not packs(torch.bfloat16)
    finally:
        ops.set_isa(None)


def test_a_compiled_model_calls_it_between_its_graphs(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    layer = PackedLinear(torch.nn.Linear(8, 4))
    compiled = torch.compile(lambda x: torch.relu(layer(x * 2)), backend="eager")
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.relu(layer(x * 2)))
    assert not [warning for warning in recwarn if "trace" in str(warning.message)]


class Gated(torch.nn.Module):
    """A decoder's feed-forward layer."""

    def __init__(self, inputs: int, inner: int, act: Any, bias: bool) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(inputs, inner, bias)
        self.up_proj = torch.nn.Linear(inputs, inner, bias)
        self.down_proj = torch.nn.Linear(inner, inputs, bias)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Compared:
    """A layer before and after it became one call, against its float64 copy, over several sizes together."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.errors: list[list[Any]] = [[], []]  # ours, torch's

    def add(self, make: Callable[[], torch.nn.Module], width: int, fuse: Callable[[torch.nn.Module], None]) -> None:
        """`fuse` makes the layer one call on packed products."""
        plain, exact = make().to(self.dtype), make().double()
        exact.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
        x = torch.randn(1, 131, width).to(self.dtype)
        with torch.inference_mode():
            expected, torchs = exact(x.double()), plain(x)
            fuse(plain)
            ours = plain(x)
            alone = torch.cat([plain(x[:, i : i + 1]) for i in range(131)], 1)
        assert ours.dtype == self.dtype
        assert torch.equal(ours, alone)
        for kind, result in enumerate((ours, torchs)):
            self.errors[kind].append((result - expected).ravel())

    def check(self) -> None:
        ours, plain = (torch.cat(parts).square().mean().sqrt() for parts in self.errors)
        assert ours <= 2 * plain


@pytest.mark.parametrize("act", [torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU(approximate="tanh")], ids=str)
def test_a_gated_layer_in_one_call_errs_no_more_than_torch(dtype: Any, act: Any) -> None:
    torch.manual_seed(0)
    compared = Compared(dtype)

    def fuse(layer: torch.nn.Module) -> None:
        pack_linears(layer)
        assert fuse_gated(layer)

    for inputs, inner, bias in [(32, 64, False), (40, 50, True), (64, 200, False), (7, 5, False)]:
        compared.add(functools.partial(Gated, inputs, inner, act, bias), inputs, fuse)
    compared.check()


@pytest.mark.parametrize("act", [torch.nn.Softplus(), torch.nn.Tanh()], ids=str)
def test_a_layer_of_another_formula_is_left_alone(act: Any) -> None:
    layer = Gated(16, 32, act, False)
    assert not fuse_gated(layer)
    pack_linears(layer)
    assert not fuse_gated(layer)
    twisted = Gated(16, 32, torch.nn.SiLU(), False)
    twisted.forward = lambda x: twisted.down_proj(twisted.act_fn(twisted.up_proj(x)) * twisted.gate_proj(x))  # type: ignore[method-assign]
    pack_linears(twisted)
    assert not fuse_gated(twisted)


class Inner(torch.nn.Module):
    """BERT's first half of a feed-forward layer."""

    def __init__(self, inputs: int, inner: int, act: Any) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = torch.nn.Linear(inputs, inner), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.intermediate_act_fn(self.dense(x))
        return result


class Layer(torch.nn.Module):
    """BERT's feed-forward layer, or one of three attributes, with a residual that needs the layer's own input."""

    def __init__(self, inputs: int, inner: int, act: Any, names: tuple[str, str, str] | None) -> None:
        super().__init__()
        self.names = names
        if names is None:
            self.intermediate, self.output = Inner(inputs, inner, act), torch.nn.Module()
            self.output.dense = torch.nn.Linear(inner, inputs)
        else:
            made = torch.nn.Linear(inputs, inner), act, torch.nn.Linear(inner, inputs)
            for name, value in zip(names, made, strict=True):
                setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.names is None:
            return x + self.output.dense(self.intermediate(x))  # type: ignore[operator, union-attr]
        up, act, down = (getattr(self, name) for name in self.names)
        return x + down(act(up(x)))


LAYOUTS = [None, ("ffn", "activation", "ffn_output"), ("lin1", "activation", "lin2")]


@pytest.mark.parametrize("act", [torch.nn.GELU(), torch.nn.functional.gelu, torch.nn.ReLU()], ids=str)
def test_a_feed_forward_layer_in_one_call_errs_no_more_than_torch(dtype: Any, act: Any) -> None:
    torch.manual_seed(0)
    compared = Compared(dtype)

    def fuse(layer: torch.nn.Module) -> None:
        pack_linears(layer)
        fuse_feed_forwards(layer)
        assert len(_replaced(layer)) == 2  # up hands its input on, down computes the three

    for names, (inputs, inner) in product(LAYOUTS, [(32, 64), (40, 50), (7, 5)]):
        compared.add(functools.partial(Layer, inputs, inner, act, names), inputs, fuse)
    compared.check()


def _replaced(layer: torch.nn.Module) -> list[str]:
    return [name for name, part in layer.named_modules() if "forward" in vars(part)]


@pytest.mark.parametrize("act", [torch.nn.GELU(), torch.nn.functional.gelu], ids=str)
def test_a_feed_forward_layer_is_put_back(dtype: Any, act: Any) -> None:
    for names in LAYOUTS:
        layer, x = Layer(32, 64, act, names).to(dtype), torch.randn(1, 131, 32).to(dtype)
        with torch.inference_mode():
            pack_linears(layer)
            apart = layer(x)
            put_back = fuse_feed_forwards(layer)
            assert _replaced(layer)
            put_back()
            assert not _replaced(layer)
            assert torch.equal(layer(x), apart)


def test_a_feed_forward_layer_of_another_formula_is_left_alone() -> None:
    for act, names in product([torch.nn.Softplus(), torch.nn.Tanh()], LAYOUTS):
        layer = Layer(16, 32, act, names)
        fuse_feed_forwards(layer)  # nothing is packed yet
        pack_linears(layer)
        fuse_feed_forwards(layer)
        assert not _replaced(layer)


def _child(linear: PackedLinear, x: torch.Tensor, expected: torch.Tensor) -> None:
    with torch.inference_mode():  # an op of torch's on many elements would wait for its lost workers for ever
        np.testing.assert_array_equal(linear(x).numpy(), expected.numpy())


def test_torchs_workers_and_our_own_give_the_same_bits() -> None:
    if not share_openmp():
        pytest.skip("this torch is built without OpenMP")
    linear, x = PackedLinear(torch.nn.Linear(64, 48)), torch.randn(700, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            shared = linear(x)
            _cpu.set_openmp(0)
            assert torch.equal(linear(x), shared)
            share_openmp()
            with ThreadPoolExecutor(4) as callers:  # torch keeps workers for each thread that calls
                assert all(torch.equal(ours, shared) for ours in callers.map(linear, [x] * 20))
        if "fork" in multiprocessing.get_all_start_methods():  # OpenMP's workers are not there in a child
            child = multiprocessing.get_context("fork").Process(target=_child, args=(linear, x, shared))
            child.start()
            child.join(60)
            assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
        share_openmp()
