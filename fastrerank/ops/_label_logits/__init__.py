"""The Python face of `ops.label_logits`: checks, and a choice between C++ (CPU tensors) and Triton (CUDA tensors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch

import fastrerank._cpu as _cpu
from fastrerank.ops._tensors import (
    DTYPES,
    as_float,
    check_tensor,
    choose_backend,
    not_negative,
    on_device,
    register_op,
    said,
)
from fastrerank.runtime import cpu

__all__ = ["label_logits"]

_NORMS = (None, "rms", "layer")


@overload
def label_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: str | None = ...,
    norm_weight: torch.Tensor | None = ...,
    norm_bias: torch.Tensor | None = ...,
    eps: float = ...,
    bias: torch.Tensor | None = ...,
    scale: float = ...,
    softcap: float = ...,
    return_order: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def label_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: str | None = ...,
    norm_weight: torch.Tensor | None = ...,
    norm_bias: torch.Tensor | None = ...,
    eps: float = ...,
    bias: torch.Tensor | None = ...,
    scale: float = ...,
    softcap: float = ...,
    return_order: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def label_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    return_order: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Like `cap(norm(hidden.float()) @ weight.float().T * scale + bias)`: K rows of an LM head at N positions.

    The readout of LLM reranking by first-token logits: yes and no (Qwen3-Reranker, arXiv 2506.05176), or the
    identifiers of a list (FIRST, arXiv 2406.15657). Everything is float32 from the load on: unlike the
    module's norm, it does not round normed values to 16 bits. The vocabulary's other rows are never read. The minimum
    traffic is N h values of `hidden`, K h values of `weight` and 4 N K bytes of logits: 0.8 MB for 100 rows of 4096 in
    bfloat16 and 2 labels. The 2 N K h operations take little time beside it.

    Args:
        hidden: (N, h) float32, float16 or bfloat16: the final norm's input, or its output where `norm` is None. Any
            stride between rows, also 0.
        weight: (K, h) the labels' rows of the LM head, in any of these dtypes, any stride between rows.
        norm: None; "rms": x * rsqrt(mean(x^2) + eps) * norm_weight; "layer": the same on x - mean(x), plus norm_bias.
        norm_weight: (h,) in any of these dtypes; None for ones. Gemma's norms multiply by 1 + w: pass that.
        norm_bias: (h,) likewise, with "layer" only.
        eps: of the norm.
        bias: (K,) likewise, added after `scale`; None for zeros.
        scale: factor of the products: Cohere's logit_scale, 1 / logits_scaling of Granite, dim_model_base / h of
            MiniCPM, h**-0.5 of T5 with tied embeddings.
        softcap: logits become softcap * tanh(logit / softcap) where it is above 0 (Gemma 2).
        return_order: also return the labels' order.
        backend: "cpp" (CPU tensors) or "triton" (CUDA tensors, or CPU tensors under TRITON_INTERPRET=1); None chooses.

    Returns float32 (N, K), and with `return_order` int32 (N, K): positions of labels by logit descending, ties by
    position. A hidden value that is NaN makes its row NaN, and so does an infinite one under a norm. The order treats
    NaN as -infinity, so check the logits before you rank.

    A row's result depends on that row alone: on the CPU its bits do not depend on N, on its place or on the number of
    threads.

    Raises TypeError, ValueError naming the argument; ValueError if a gradient is required: there is none.

    Example:
        >>> import torch
        >>> logits, order = label_logits(torch.tensor([[3.0, 4.0]]), torch.eye(2), scale=0.5, return_order=True)
        >>> logits.tolist(), order.tolist()
        ([[1.5, 2.0]], [[1, 0]])
    """
    tensors = (hidden, weight, norm_weight, norm_bias, bias)
    if torch.is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors):
        raise ValueError("label_logits has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    run: Callable[..., Any] = torch.ops.fastrerank.label_logits if torch.compiler.is_compiling() else _run
    logits, order = run(hidden, weight, norm, norm_weight, norm_bias, eps, bias, scale, softcap, return_order, backend)
    return (logits, order) if return_order else logits


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    return_order: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(hidden, weight, norm, norm_weight, norm_bias, bias)
    backend = choose_backend(hidden.device, backend, "hidden")
    eps, softcap = not_negative("eps", eps), not_negative("softcap", softcap)
    scale = as_float("scale", scale, "finite")
    rows, labels = hidden.shape[0], weight.shape[0]
    logits = torch.empty((rows, labels), dtype=torch.float32, device=hidden.device)
    order = torch.empty((rows if return_order else 0, labels), dtype=torch.int32, device=hidden.device)
    if rows == 0:
        return logits, order
    places = order if return_order else None
    given = (hidden, weight, norm, norm_weight, norm_bias, eps, bias, scale, softcap, logits, places)
    if backend == "triton":
        from fastrerank.ops._label_logits.triton import label_logits as launch

        with on_device(hidden, "hidden"):
            launch(*given)
    else:
        _cpp(*given)
    return logits, order


def _cpp(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    logits: torch.Tensor,
    order: torch.Tensor | None,
) -> None:
    given = [None if x is None else x.float().contiguous() for x in (norm_weight, norm_bias, bias)]
    gamma, beta, added, places = (0 if x is None else x.data_ptr() for x in (*given, order))
    _cpu.label_logits(
        hidden.data_ptr(),
        str(hidden.dtype)[6:],
        hidden.stride(0),
        hidden.shape[0],
        weight.data_ptr(),
        str(weight.dtype)[6:],
        weight.stride(0),
        weight.shape[0],
        weight.shape[1],
        norm or "none",
        gamma,
        beta,
        eps,
        added,
        scale,
        softcap,
        logits.data_ptr(),
        places,
        cpu.num_threads(),
        cpu.isa(),
    )


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    for name, tensor, letter in (("hidden", hidden, "N"), ("weight", weight, "K")):
        check_tensor(name, tensor)
        if tensor.ndim != 2 or tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16 ({letter}, h), got {said(tensor)}")
        if tensor.stride(1) != 1 and tensor.shape[1] > 1 and tensor.numel():
            raise ValueError(
                f"{name} must have contiguous rows, got strides {tuple(tensor.stride())}; call .contiguous()"
            )
    width, labels = hidden.shape[1], weight.shape[0]
    if width < 1:
        raise ValueError(f"hidden must have at least one column, got shape {tuple(hidden.shape)}")
    if labels < 1 or weight.shape[1] != width:
        raise ValueError(f"weight must be (K, {width}) with K of at least 1, got shape {tuple(weight.shape)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device} like hidden, got {weight.device}")
    if max(hidden.shape[0], labels, width) >= 2**31:
        raise ValueError(f"hidden and weight must have sides below 2**31, got {said(hidden)} and {said(weight)}")
    if norm not in _NORMS:
        raise ValueError(f'norm must be None, "rms" or "layer", got {norm!r}')
    for name, vector, size in (
        ("norm_weight", norm_weight, width),
        ("norm_bias", norm_bias, width),
        ("bias", bias, labels),
    ):
        if vector is None:
            continue
        check_tensor(name, vector)
        if vector.shape != (size,) or vector.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16 of shape ({size},), got {said(vector)}")
        if vector.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {vector.device}")
    if norm is None and norm_weight is not None:
        raise ValueError('norm_weight needs norm "rms" or "layer", got norm None')
    if norm != "layer" and norm_bias is not None:
        raise ValueError(f'norm_bias needs norm "layer", got norm {norm!r}')


def _fake(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, labels, return_order = hidden.shape[0], weight.shape[0], others[-2]
    order = hidden.new_empty((rows if return_order else 0, labels), dtype=torch.int32)
    return hidden.new_empty((rows, labels), dtype=torch.float32), order


register_op(
    "label_logits(Tensor hidden, Tensor weight, str? norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor? bias, float scale, float softcap, bool return_order, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
