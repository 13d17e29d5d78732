"""`rotary` against its reference, in Triton on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from fastrerank.ops import reference
from fastrerank.ops._rotary import rotary

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter cuts bfloat16 off where GPUs round it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


class Case(NamedTuple):
    """Query and key heads, tokens, head size, columns that turn; `angles` in float32 or in the dtype of q."""

    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    rotated: int
    single: bool = False


CASES = {
    "modernbert": Case(3, 3, 41, 64, 64),
    "grouped heads": Case(14, 2, 35, 64, 64),
    "float32 angles": Case(4, 4, 33, 128, 128, single=True),
    "partial": Case(5, 1, 19, 80, 32),
    "half is no power of two": Case(6, 2, 70, 96, 96, single=True),
    "small": Case(4, 2, 3, 10, 6),
    "wide": Case(2, 1, 9, 256, 256),
    "one token": Case(1, 1, 1, 2, 2),
}


def tensors(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries and keys as views of one product (1, T, 3, H, D), cosines and sines of any angles."""
    random = np.random.default_rng(0)
    product = torch.tensor(random.normal(0, 3, (1, case.tokens, 2, case.heads, case.head_dim))).to(DEVICE, dtype)
    q, k = (part.transpose(1, 2) for part in product.unbind(2))
    angles = random.normal(0, 9, (2, 1, case.tokens, case.rotated))
    kind = torch.float32 if case.single else dtype
    cos, sin = (torch.tensor(f(angle)).to(DEVICE, kind) for f, angle in zip((np.cos, np.sin), angles, strict=True))
    return [q, k[:, : case.kv_heads], cos, sin]


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same as transformers' models write it."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned.to(x.dtype), rest], -1)


def check(given: list[torch.Tensor]) -> None:
    """Errors against float64 of at most twice those of plain torch in the same dtype."""
    q, k, cos, sin = given
    right = reference.rotary(*(x.double().cpu().numpy() for x in given))
    for x, out, exact in zip((q, k), rotary(*given), right, strict=True):
        assert out.dtype == x.dtype
        assert out.shape == x.shape
        assert out.stride(-1) == 1
        assert (out[..., cos.shape[-1] :] == x[..., cos.shape[-1] :]).all()
        ours, theirs = (y.double().cpu().numpy() - exact for y in (out, plain(x, cos, sin)))
        rms = [float(np.sqrt(np.mean(error**2))) for error in (ours, theirs)]
        assert rms[0] <= 2 * rms[1] + 1e-9, f"rms error {rms[0]:.3g}, plain torch's {rms[1]:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check(tensors(CASES[name], dtype))


def test_tensors_that_lie_otherwise_are_read_in_place() -> None:
    q, k, cos, sin = tensors(Case(3, 2, 21, 16, 16), torch.float32)
    expected = rotary(q, k, cos, sin)
    table = torch.full((1, 21, 40), torch.nan, device=DEVICE)
    table[..., :16], table[..., 20:36] = cos, sin
    found = rotary(q.contiguous(), k.contiguous(), table[..., :16], table[..., 20:36])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    before = q.clone()
    rotary(q, k, cos, sin)
    assert torch.equal(q, before)
    one = cos[:, :1].expand(-1, 21, -1)
    check([q, k, one, sin])


def test_no_tokens() -> None:
    q = torch.zeros((1, 2, 0, 8), device=DEVICE)
    assert [x.shape for x in rotary(q, q, q[0, :1], q[0, :1])] == [q.shape, q.shape]


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 4, 8), "q must be"),
        (1, torch.zeros(1, 3, 5, 8), "k must be"),
        (1, torch.zeros(1, 3, 4, 8, dtype=torch.float16), "k must be"),
        (2, torch.zeros(1, 4, 7), "cos and sin"),
        (3, torch.zeros(1, 4, 10), "cos and sin"),
        (3, torch.zeros(1, 8, 4).transpose(1, 2), "sin must be contiguous"),
    ],
)
def test_wrong_arguments_are_named(at: int, wrong: torch.Tensor, message: str) -> None:
    given = [torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
    given[at] = wrong
    with pytest.raises(ValueError, match=message):
        rotary(*(x.to(DEVICE) for x in given))


def test_compiled_it_is_one_node() -> None:
    given: list[Any] = tensors(CASES["grouped heads"], torch.float32)
    compiled = torch.compile(lambda *x: rotary(*x), backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), rotary(*given), strict=True))
