"""`ops.label_logits` against its reference: in C++ at every level, in Triton on a GPU or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastrerank import ops
from fastrerank.ops import reference

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """N rows of h, K labels, and what `ops.label_logits` is told; `vectors`: which of its vectors are given."""

    rows: int
    labels: int
    width: int
    norm: str | None = None
    vectors: tuple[str, ...] = ()
    options: Mapping[str, float] = MappingProxyType({})


CASES = {
    "bare products": Case(33, 2, 64),
    "rms, two labels": Case(50, 2, 1024, "rms", ("norm_weight",)),
    "rms, all identifiers, capped": Case(9, 26, 129, "rms", ("norm_weight",), {"softcap": 3.0}),
    "rms without a weight": Case(30, 3, 257, "rms", (), {"eps": 1e-5}),
    "layer, no bias, scaled": Case(21, 5, 300, "layer", ("norm_weight",), {"scale": 0.0625}),
    "layer, both vectors, head bias": Case(17, 7, 95, "layer", ("norm_weight", "norm_bias", "bias"), {"eps": 1e-5}),
    "layer without vectors": Case(18, 4, 31, "layer"),
    "everything": Case(14, 11, 1031, "layer", ("norm_weight", "norm_bias", "bias"), {"scale": 0.5, "softcap": 2.0}),
    "one label": Case(40, 1, 773, "rms", ("norm_weight", "bias")),
    "many labels": Case(6, 101, 160, "rms", ("norm_weight",)),
    "wide": Case(8, 2, 8200, "rms", ("norm_weight",)),
    "three columns": Case(35, 3, 3, "rms", ("norm_weight", "bias")),
    "one column": Case(32, 2, 1, None, ("bias",)),
}


def tensors(case: Case, dtype: Any, weight_dtype: Any | None = None, device: str = "cpu") -> dict[str, Any]:
    """Arguments of the op: a residual stream of spread 3 about 0.5, labels of spread h**-0.5."""
    random = np.random.default_rng(0)
    hidden = random.normal(0.5, 3, (case.rows, case.width))
    weight = random.normal(0, case.width**-0.5, (case.labels, case.width))
    drawn = {
        "norm_weight": random.normal(1, 0.2, case.width),
        "norm_bias": random.normal(0, 0.1, case.width),
        "bias": random.normal(0, 0.5, case.labels),
    }
    weight_dtype = weight_dtype or dtype
    given = {"hidden": torch.tensor(hidden).to(dtype), "weight": torch.tensor(weight).to(weight_dtype)}
    given |= {name: torch.tensor(drawn[name]).to(weight_dtype) for name in case.vectors}
    return {name: tensor.to(device) for name, tensor in given.items()} | {"norm": case.norm, **case.options}


def plain(given: dict[str, Any]) -> Any:
    """The same as one writes it in torch, in float32."""
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    x, eps = wide["hidden"], wide.get("eps", 1e-6)
    if given["norm"] == "layer":
        x = torch.nn.functional.layer_norm(x, x.shape[1:], wide.get("norm_weight"), wide.get("norm_bias"), eps)
    elif given["norm"] == "rms":
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * wide.get("norm_weight", 1.0)
    logits = x @ wide["weight"].T * wide.get("scale", 1.0) + wide.get("bias", 0.0)
    cap = wide.get("softcap", 0.0)
    return cap * torch.tanh(logits / cap) if cap else logits


def exact(given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The reference in float64, on the same values."""
    arrays = {
        name: value.double().cpu().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    return reference.label_logits(**arrays)


def check(given: dict[str, Any], **options: Any) -> None:
    """Errors against float64 of at most twice those of plain torch in float32, whatever the inputs' dtype."""
    logits, order = ops.label_logits(**given, return_order=True, **options)
    right, _ = exact(given)
    assert logits.dtype == torch.float32
    assert order.dtype == torch.int32
    assert logits.shape == order.shape == right.shape
    ours, theirs = (x.double().cpu().numpy() - right for x in (logits, plain(given)))
    floor = 0.5 * 2.0**-23 * float(np.abs(right).max())  # half a last bit: torch's few values may have been lucky
    rms = [float(np.sqrt(np.mean(error**2))) for error in (ours, theirs)]
    assert rms[0] <= 2 * rms[1] + floor, f"rms error {rms[0]:.3g}, plain torch's {rms[1]:.3g}"
    assert np.abs(ours).max() <= 4 * np.abs(theirs).max() + 4 * floor
    stable = np.argsort(-logits.double().cpu().numpy(), axis=1, kind="stable")
    np.testing.assert_array_equal(order.cpu(), stable)
    assert torch.equal(ops.label_logits(**given, **options), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("isa")
def test_cpp_equals_the_reference(name: str, dtype: Any) -> None:
    check(tensors(CASES[name], dtype))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
@pytest.mark.usefixtures("isa")
def test_cpp_mixed_dtypes(dtypes: tuple[Any, Any]) -> None:
    check(tensors(CASES["everything"], *dtypes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.gpu
def test_triton_equals_the_reference(name: str, dtype: Any) -> None:
    pytest.importorskip("triton")
    check(tensors(CASES[name], dtype, device="cuda" if GPU else "cpu"), backend="triton")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.gpu
def test_triton_mixed_dtypes(dtypes: tuple[Any, Any]) -> None:
    pytest.importorskip("triton")
    check(tensors(CASES["everything"], *dtypes, device="cuda" if GPU else "cpu"), backend="triton")


BACKENDS = ["cpp", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def op(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ops.label_logits` of either backend, on that backend's device; its results come back to the CPU."""
    if request.param == "cpp":
        return lambda *args, **options: ops.label_logits(*args, backend="cpp", **options)
    pytest.importorskip("triton")

    def there(x: Any) -> Any:
        return x.cuda() if isinstance(x, torch.Tensor) and GPU else x

    def call(*args: Any, **options: Any) -> Any:
        options = {name: there(value) for name, value in options.items()}
        found = ops.label_logits(*map(there, args), backend="triton", **options)
        return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_are_read_in_place(op: Callable[..., Any], dtype: Any) -> None:
    given = tensors(Case(6, 5, 130, "rms", ("norm_weight",)), dtype)
    hidden, weight = given.pop("hidden"), given.pop("weight")
    expected = op(hidden, weight, **given)
    wide = torch.full((12, 140), torch.nan, dtype=dtype)
    wide[::2, 3:133] = hidden
    head = torch.full((90, 133), torch.nan, dtype=dtype)
    head[4:79:18, 2:132] = weight
    assert torch.equal(op(wide[::2, 3:133], head[4:79:18, 2:132], **given), expected)
    last = torch.full((6, 4, 130), torch.nan, dtype=dtype)
    last[:, -1] = hidden
    assert torch.equal(op(last[:, -1], weight, **given), expected)
    assert torch.equal(op(hidden[2:3].expand(7, -1), weight, **given), expected[2:3].expand(7, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_cpp_a_row_is_bitwise_the_same_in_any_company(dtype: Any) -> None:
    # 0.37 million products, so that the larger calls are of several tasks
    given = tensors(Case(150, 6, 231, "layer", ("norm_weight", "norm_bias", "bias"), {"softcap": 2.0}), dtype)
    hidden, weight, bias = given.pop("hidden"), given.pop("weight"), given.pop("bias")
    logits, order = ops.label_logits(hidden, weight, bias=bias, **given, return_order=True)
    try:
        for threads in (1, 3):
            ops.set_num_threads(threads)
            for begin, end in ((0, 150), (0, 1), (7, 8), (3, 10), (5, 149)):
                some, places = ops.label_logits(hidden[begin:end], weight, bias=bias, **given, return_order=True)
                assert torch.equal(some, logits[begin:end])
                assert torch.equal(places, order[begin:end])
    finally:
        ops.set_num_threads(None)
    for begin, end in ((0, 1), (1, 6), (2, 5)):  # nor does a logit depend on the other labels
        assert torch.equal(
            ops.label_logits(hidden, weight[begin:end], bias=bias[begin:end], **given), logits[:, begin:end]
        )


@pytest.mark.parametrize("labels", [3, 40])
def test_ties_stand_in_their_order_and_nan_with_minus_infinity(op: Callable[..., Any], labels: int) -> None:
    weight = torch.zeros(labels, 2)
    weight[1::2, 0] = 1.0
    logits, order = op(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), weight, return_order=True)
    odd, even = list(range(1, labels, 2)), list(range(0, labels, 2))
    assert logits[:, 1].tolist() == [1.0, -1.0]
    assert order.tolist() == [odd + even, even + odd]
    bias = torch.zeros(labels)
    bias[0], bias[1], bias[2] = torch.nan, 5.0, -torch.inf
    logits, order = op(torch.zeros(1, 2), weight, bias=bias, return_order=True)
    assert logits[0, 0].isnan()
    assert order.tolist() == [[1, *range(3, labels), 0, 2]]


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 66])
@pytest.mark.usefixtures("isa")
def test_a_value_that_is_not_finite_spoils_its_row_only(
    op: Callable[..., Any], norm: str | None, dtype: Any, at: int
) -> None:
    given = tensors(Case(6, 3, 67, norm), dtype)
    clean = op(**given)
    for value in (torch.nan, torch.inf):
        hidden = given["hidden"].clone()
        hidden[2, at] = value
        spoiled = op(**(given | {"hidden": hidden}))
        assert (spoiled[2].isinf() if norm is None and value == torch.inf else spoiled[2].isnan()).all()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(spoiled[others], clean[others])
    weight = given["weight"].clone()
    weight[1, at] = torch.nan
    spoiled = op(**(given | {"weight": weight}))
    assert spoiled[:, 1].isnan().all()
    assert torch.equal(spoiled[:, [0, 2]], clean[:, [0, 2]])


def test_the_smallest_and_largest_float16_are_themselves(op: Callable[..., Any]) -> None:
    values = torch.tensor([2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 65504.0, -65504.0, 0.0], dtype=torch.float16)
    logits = op(values[:, None], torch.ones(1, 1, dtype=torch.float16))
    assert torch.equal(logits[:, 0], values.float())
    logits = op(torch.ones(1, 40, dtype=torch.float16), torch.diag(torch.ones(40)).half() * values[2])
    assert (logits == values[2].float()).all()


def test_no_rows(op: Callable[..., Any]) -> None:
    logits, order = op(torch.zeros(0, 8), torch.ones(3, 8), norm="rms", return_order=True)
    assert logits.shape == order.shape == (0, 3)
    assert (logits.dtype, order.dtype) == (torch.float32, torch.int32)


def head_of(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """A tiny model of a family, its final norm, and what `ops.label_logits` is told to be its head."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 90,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if family == "gemma2":
        config = transformers.Gemma2Config(**sizes, final_logit_softcapping=2.0, rms_norm_eps=1e-4)
        model = transformers.Gemma2ForCausalLM(config)
        torch.nn.init.normal_(model.model.norm.weight, 0, 0.3)
        return (
            model,
            model.model.norm,
            {
                "norm": "rms",
                "norm_weight": 1 + model.model.norm.weight,
                "eps": 1e-4,
                "softcap": 2.0,
            },
        )
    if family == "granite":
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=8.0))
        torch.nn.init.normal_(model.model.norm.weight, 1, 0.3)
        return model, model.model.norm, {"norm": "rms", "norm_weight": model.model.norm.weight, "scale": 1 / 8.0}
    if family == "cohere":
        model = transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, logit_scale=0.25))
        torch.nn.init.normal_(model.model.norm.weight, 1, 0.3)
        return (
            model,
            model.model.norm,
            {
                "norm": "layer",
                "norm_weight": model.model.norm.weight,
                "eps": 1e-5,
                "scale": 0.25,
            },
        )
    sizes = {key: value for key, value in sizes.items() if key != "head_dim"}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, layer_norm_eps=1e-5))
    norm = model.model.final_layernorm
    for parameter in (norm.weight, norm.bias, model.lm_head.bias):
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    return (
        model,
        norm,
        {
            "norm": "layer",
            "norm_weight": norm.weight,
            "norm_bias": norm.bias,
            "eps": 1e-5,
            "bias": model.lm_head.bias,
        },
    )


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "phi"])
def test_the_heads_of_transformers(family: str) -> None:
    with torch.no_grad():
        model, norm, options = head_of(family)
        model.eval()
        residual = []
        norm.register_forward_pre_hook(lambda _, inputs: residual.append(inputs[0]))
        ids = torch.randint(3, 90, (5, 9), generator=torch.Generator().manual_seed(0))
        expected = model(input_ids=ids).logits[:, -1]
        labels = torch.tensor([7, 3, 88, 7])
        options = {name: value[labels] if name == "bias" else value for name, value in options.items()}
        logits = ops.label_logits(residual[0][:, -1], model.lm_head.weight[labels], **options)
    assert (expected.std() > 0.01).item()
    assert (logits - expected[:, labels]).abs().max() <= 2e-5 * expected.abs().max()


EXAMPLE = Case(4, 3, 16, "layer", ("norm_weight", "norm_bias", "bias"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(16)}, r"hidden must be .* \(N, h\), got torch.float32 \(16,\)"),
        ({"hidden": torch.zeros(4, 16, dtype=torch.float64)}, "hidden must be float32, float16 or bfloat16"),
        ({"hidden": torch.zeros(16, 4).T}, "hidden must have contiguous rows, got strides"),
        ({"hidden": torch.zeros(4, 0)}, "hidden must have at least one column"),
        ({"hidden": torch.zeros(4, 16, requires_grad=True)}, "no gradient"),
        ({"bias": torch.zeros(3, requires_grad=True)}, "no gradient"),
        ({"hidden": torch.zeros(4, 16, device="meta")}, "weight must be on meta like hidden, got cpu"),
        ({"weight": torch.zeros(3, 16, dtype=torch.int32)}, r"weight must be .* \(K, h\), got torch.int32"),
        ({"weight": torch.zeros(3, 15)}, r"weight must be \(K, 16\) .* got shape \(3, 15\)"),
        ({"weight": torch.zeros(0, 16)}, "K of at least 1"),
        ({"weight": torch.zeros(16, 3).T}, "weight must have contiguous rows"),
        ({"norm": "batch"}, 'norm must be None, "rms" or "layer", got \'batch\''),
        ({"norm": None}, "norm_weight needs norm"),
        ({"norm": "rms"}, "norm_bias needs norm \"layer\", got norm 'rms'"),
        ({"norm_weight": torch.zeros(15)}, r"norm_weight must be .* of shape \(16,\), got torch.float32 \(15,\)"),
        ({"norm_bias": torch.zeros(16).double()}, "norm_bias must be float32, float16 or bfloat16"),
        ({"bias": torch.zeros(16)}, r"bias must be .* of shape \(3,\)"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must be on cpu like hidden, got meta"),
        ({"eps": -1e-6}, "eps must be finite and at least 0"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"softcap": -1.0}, "softcap must be finite and at least 0"),
        ({"softcap": float("nan")}, "softcap must be finite"),
        ({"backend": "cuda"}, "backend must be one of cpp, triton or None, got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.label_logits(**(tensors(EXAMPLE, torch.float32) | changes))


@pytest.mark.parametrize("name", ["hidden", "weight", "norm_weight", "norm_bias", "bias"])
def test_arrays_that_are_no_tensors_are_refused(name: str) -> None:
    given = tensors(EXAMPLE, torch.float32)
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor.*, got 'ndarray'"):
        ops.label_logits(**(given | {name: given[name].numpy()}))


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="takes CUDA tensors"):
        ops.label_logits(**tensors(EXAMPLE, torch.float32), backend="triton")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_one_graph(backend: str) -> None:
    given = tensors(EXAMPLE, torch.float32)
    hidden = given.pop("hidden")

    def layer(hidden: Any) -> Any:
        logits, order = ops.label_logits(hidden * 2, **given, return_order=True)
        return logits + 1, order, ops.label_logits(hidden, **given)

    torch._dynamo.reset()
    results = torch.compile(layer, fullgraph=True, backend=backend)(hidden)
    for compiled, eager in zip(results, layer(hidden), strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("return_order", [False, True])
def test_the_registered_op_passes_torchs_checks(return_order: bool) -> None:
    given = tensors(EXAMPLE, torch.bfloat16)
    ops.label_logits(**given)
    vectors = (given["norm_weight"], given["norm_bias"], 1e-6, given["bias"])
    torch.library.opcheck(
        torch.ops.fastrerank.label_logits.default,
        (given["hidden"], given["weight"], "layer", *vectors, 2.0, 0.0, return_order, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_naming_the_op_imports_no_torch() -> None:
    code = "import sys, fastrerank.ops; print('label_logits' in fastrerank.ops.__all__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_the_reference_is_the_module_in_torch() -> None:
    given = tensors(CASES["everything"], torch.float64)
    logits, order = exact(given)
    norm = torch.nn.functional.layer_norm
    x = norm(given["hidden"], (1031,), given["norm_weight"], given["norm_bias"], 1e-6)
    expected = 2 * torch.tanh((x @ given["weight"].T * 0.5 + given["bias"]) / 2)
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(order, expected.argsort(dim=1, descending=True))
