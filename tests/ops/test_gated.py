"""`gated` against its reference, in Triton on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from fastrerank.ops import reference
from fastrerank.ops._gated import gated

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter cuts bfloat16 off where GPUs round it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
PLAIN: dict[str, Any] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def rows(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).normal(0, 3, shape)).to(DEVICE, dtype)


def check(x: torch.Tensor, activation: str) -> None:
    """An error against float64 of at most twice that of plain torch in the same dtype."""
    right = reference.gated(x.double().cpu().numpy(), activation)
    out = gated(x, activation)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    first, second = x.chunk(2, -1)
    ours, theirs = (y.double().cpu().numpy() - right for y in (out, PLAIN[activation](first) * second))
    rms = [float(np.sqrt(np.mean(error**2))) for error in (ours, theirs)]
    assert rms[0] <= 2 * rms[1] + 1e-9, f"rms error {rms[0]:.3g}, plain torch's {rms[1]:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PLAIN)
def test_equals_the_reference(activation: str, dtype: torch.dtype) -> None:
    for shape in ((1, 7, 2 * 50), (3, 2 * 1152), (1, 2), (2, 2 * 1024)):
        check(rows(shape, dtype), activation)
    wide = rows((1, 5, 300), dtype)
    check(wide[..., 4:244], activation)
    check(wide.transpose(1, 2)[..., :4], activation)


def test_extreme_values_are_torchs() -> None:
    # not infinities, of which torch's own GELU makes one thing on a CPU and another on a GPU
    x = torch.tensor([[-80.0, 80.0, torch.nan, 0.0, 1e30, -1e30, *[1.0] * 6]], device=DEVICE)
    for activation, plain in PLAIN.items():
        expected = plain(x[:, :6]) * x[:, 6:]
        # what e^-80 leaves is nothing; elsewhere a quotient and two products round
        assert torch.allclose(gated(x, activation), expected, rtol=2.0**-22, atol=1e-30, equal_nan=True), activation


def test_no_rows_and_wrong_arguments() -> None:
    assert gated(torch.zeros((1, 0, 8), device=DEVICE), "silu").shape == (1, 0, 4)
    with pytest.raises(ValueError, match="x must be"):
        gated(torch.zeros((1, 7), device=DEVICE), "silu")
    with pytest.raises(ValueError, match="activation must be one of"):
        gated(torch.zeros((1, 8), device=DEVICE), "elu")


def test_compiled_it_is_one_node() -> None:
    x = rows((1, 7, 100), torch.float32)
    compiled = torch.compile(lambda x: gated(x, "silu"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), gated(x, "silu"))
