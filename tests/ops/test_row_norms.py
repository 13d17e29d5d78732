"""Norms in one pass of float32 over each row, against torch's modules."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastrerank.engine.torch.row_norms import fuse_norm, read_norm
from fastrerank.ops._norm_rows import norm_rows_cpu

KINDS = {
    "llama": lambda n: LlamaRMSNorm(n, 1e-6),
    "gemma": lambda n: Gemma2RMSNorm(n, 1e-6),
    "layer": lambda n: torch.nn.LayerNorm(n, 1e-5),
    "layer without bias": lambda n: torch.nn.LayerNorm(n, bias=False),
}


def build(kind: str, width: int, dtype: Any) -> torch.nn.Module:
    torch.manual_seed(width)
    norm = KINDS[kind](width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(width))
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_error_is_at_most_twice_torchs(kind: str, dtype: Any) -> None:
    errors: list[list[Any]] = [[], []]
    for width in (8, 17, 64, 100, 512, 2304):
        plain = build(kind, width, dtype)
        exact = build(kind, width, dtype).double()
        x = (3 * torch.randn(2, 37, 3, width) + 1).to(dtype)
        with torch.inference_mode():
            # transformers' classes compute float32 whatever comes in
            expected = torch.cat([_float64(exact, row) for row in x.double().reshape(-1, width).split(1)]).view(x.shape)
            torchs = plain(x)
            assert fuse_norm(plain)
            ours = plain(x)
            assert ours.dtype == dtype
            assert torch.equal(ours[1, 5, 2], plain(x[1, 5, 2]))
            assert torch.equal(plain(x.transpose(1, 2)).transpose(1, 2), ours)
        for number, result in enumerate((ours, torchs)):
            errors[number].append((result - expected).ravel())
    ours_rms, plain_rms = (torch.cat(parts).square().mean().sqrt() for parts in errors)
    assert ours_rms <= 2 * plain_rms


def _float64(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, torch.nn.LayerNorm):
        return norm(x)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    factor = norm.weight if isinstance(norm, LlamaRMSNorm) else 1 + norm.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * factor


def test_what_is_no_such_norm_is_left_alone() -> None:
    class ScaleNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / x.norm(dim=-1, keepdim=True)

    norm = ScaleNorm()
    assert read_norm(norm, 8).kind is None
    assert not fuse_norm(norm)
    assert not fuse_norm(torch.nn.Linear(8, 8))
    assert not fuse_norm(torch.nn.LayerNorm(8).half())


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, torch.zeros(2, 8).half(), "x must be float32 or bfloat16"),
        (0, torch.zeros(2, 16)[:, ::2], "x must be .* of contiguous rows"),
        (2, torch.zeros(9), "weight must be"),
        (3, torch.zeros(16)[::2], "bias must be"),
        (5, torch.zeros(3, 8), "out must be"),
        (5, torch.zeros(2, 8).bfloat16(), "out must be"),
    ],
)
def test_wrong_arguments_are_named(at: int, wrong: torch.Tensor, message: str) -> None:
    given: list[Any] = [torch.zeros(2, 8), "rms", torch.ones(8), torch.ones(8), 1e-6, torch.zeros(2, 8)]
    given[at] = wrong
    with pytest.raises(ValueError, match=message):
        norm_rows_cpu(*given)
