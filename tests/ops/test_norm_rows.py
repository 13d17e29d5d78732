"""`norm_rows` against its reference, in Triton on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from fastrerank.ops import reference
from fastrerank.ops._norm_rows import norm_rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter cuts bfloat16 off where GPUs round it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

# Shape of x, norm, whether there is a bias, whether a residual
CASES = {
    "xlm-roberta-large": ((1, 9, 1024), "layer", True, True),
    "modernbert": ((1, 7, 768), "layer", False, False),
    "llama": ((1, 5, 4096), "rms", False, False),
    "heads": ((1, 6, 5, 128), "rms", False, False),
    "small heads": ((1, 37, 3, 8), "rms", False, True),
    "odd": ((2, 3, 3, 17), "layer", True, True),
    "one column": ((5, 1), "layer", True, False),
    "one row": ((100,), "rms", True, False),
    "wide": ((3, 9000), "layer", True, True),
}


def tensors(name: str, dtype: torch.dtype, weights: torch.dtype | None = None) -> list[Any]:
    """Arguments of the op: rows of spread 3 about 1."""
    shape, norm, biased, added = CASES[name]
    random = np.random.default_rng(0)
    x, residual = (torch.tensor(random.normal(1, 3, shape)).to(DEVICE, dtype) for _ in range(2))
    gamma, beta = (torch.tensor(random.normal(m, 0.3, shape[-1])).to(DEVICE, weights or dtype) for m in (1, 0))
    return [x, norm, gamma, beta if biased else None, 1e-6, residual if added else None]


def plain(
    x: torch.Tensor,
    norm: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The same as transformers' models write it."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    x = x if residual is None else x + residual
    if norm == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if bias is None else y + bias


def check(given: list[Any]) -> None:
    """An error against float64 of at most twice that of plain torch in the same dtype."""
    right = reference.norm_rows(*(x.double().cpu().numpy() if isinstance(x, torch.Tensor) else x for x in given))
    out = norm_rows(*given)
    assert out.dtype == given[0].dtype
    assert out.shape == given[0].shape
    assert out.is_contiguous()
    ours, theirs = (y.double().cpu().numpy() - right for y in (out, plain(*given)))
    rms = [float(np.sqrt(np.mean(error**2))) for error in (ours, theirs)]
    assert rms[0] <= 2 * rms[1] + 1e-9, f"rms error {rms[0]:.3g}, plain torch's {rms[1]:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check(tensors(name, dtype))
    check(tensors(name, dtype, torch.float32))


def test_rows_are_read_where_they_lie() -> None:
    given = tensors("small heads", torch.float32)
    expected = norm_rows(*given)
    wide = torch.full((1, 37, 60), torch.nan, device=DEVICE)
    wide[..., 4:28] = given[0].reshape(1, 37, 24)
    assert torch.equal(norm_rows(wide[..., 4:28].view(1, 37, 3, 8), *given[1:]), expected)
    given[5] = given[5].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(norm_rows(*given), expected)
    turned = given[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(norm_rows(turned, *given[1:]), expected)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_extreme_rows_are_torchs(norm: str) -> None:
    x = torch.zeros(4, 9, device=DEVICE)
    x[1, 3], x[2], x[3, 0] = torch.nan, 1e30, torch.inf
    ones = torch.ones(9, device=DEVICE)
    found = norm_rows(x, norm, ones, None, 1e-6)
    assert torch.equal(found[0], x[0])
    assert found[1].isnan().all()
    if norm == "rms":  # the mean square is infinite; 1e30 less a rounded mean is whatever it is
        assert torch.equal(found[2], plain(x, norm, ones, None, 1e-6, None)[2])
    assert found[3, 0].isnan()


def test_no_rows() -> None:
    ones = torch.ones(8, device=DEVICE)
    assert norm_rows(torch.zeros((1, 0, 8), device=DEVICE), "rms", ones, None, 0.0).shape == (1, 0, 8)


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, torch.zeros(2, 20000), "x must be"),
        (1, "batch", "norm must be"),
        (2, torch.zeros(9), "weight must be"),
        (3, torch.zeros(16, device=DEVICE)[::2], "bias must be"),
        (5, torch.zeros(3, 8), "residual must be"),
        (5, torch.zeros(2, 8, dtype=torch.float16), "residual must be"),
    ],
)
def test_wrong_arguments_are_named(at: int, wrong: Any, message: str) -> None:
    given: list[Any] = [torch.zeros(2, 8), "rms", torch.ones(8), torch.ones(8), 1e-6, torch.zeros(2, 8)]
    given[at] = wrong
    with pytest.raises(ValueError, match=message):
        norm_rows(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given))


def test_compiled_it_is_one_node() -> None:
    given = tensors("heads", torch.float32)
    compiled = torch.compile(lambda x: norm_rows(x, *given[1:]), backend="eager", fullgraph=True)
    assert torch.equal(compiled(given[0]), norm_rows(*given))
