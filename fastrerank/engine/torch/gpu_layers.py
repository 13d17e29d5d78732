"""A Hugging Face model's layers on fused GPU kernels, as far as they are proved to compute the same."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch

from fastrerank.engine.torch.linear import activation_of
from fastrerank.engine.torch.probe import relative_error, when_equal
from fastrerank.engine.torch.row_norms import read_norm
from fastrerank.ops._gated import gated
from fastrerank.ops._norm_rows import norm_rows
from fastrerank.ops._rotary import rotary

__all__ = ["fuse_gated_layers", "fuse_norms", "fuse_on_gpu", "fuse_rotary", "fuse_sums", "merge_projections"]

log = logging.getLogger("fastrerank")

Undo = Callable[[], None]
# Where a feed-forward layer down(act(a(x)) * b(x)) keeps its parts; a and b may be one product already.
_GATED = (
    (("gate_proj", "up_proj"), "act_fn", "down_proj"),  # Llama and its many relatives
    (("gate_up_proj",), "activation_fn", "down_proj"),  # Phi-3
    (("Wi",), "act", "Wo"),  # ModernBERT
)
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_ROTARY = "apply_rotary_pos_emb"


def fuse_on_gpu(runner: Any) -> None:
    """Put a packed model's passes between products on few kernels, unless it then computes something else.

    What is replaced is proved by itself on random values; what the whole model makes of it, on a few tokens.
    """
    name = type(runner.backbone).__name__
    steps: tuple[tuple[str, Callable[[torch.nn.Module], Undo]], ...] = (
        ("rotary embedding", fuse_rotary),
        ("sums before norms", fuse_sums),
        ("norms", fuse_norms),
        ("gated feed-forward layers", fuse_gated_layers),
        ("queries', keys' and values' products", merge_projections),
    )
    for what, step in steps:
        if problem := when_equal(runner, functools.partial(step, runner.backbone)):
            log.info("%s keeps its own %s: %s", name, what, problem)


def fuse_rotary(model: torch.nn.Module) -> Undo:
    """Make layers that call `apply_rotary_pos_emb` call our kernel where it is the rotation by halves; what undoes it.

    Only the layer's own forward sees another function under that name: no global of transformers' changes.
    """
    place = next(model.parameters()).device
    made: dict[Any, Any] = {}
    changed: list[torch.nn.Module] = []
    for module in model.modules():
        forward = type(module).forward
        if "forward" in vars(module) or not isinstance(forward, types.FunctionType):
            continue
        theirs = forward.__globals__.get(_ROTARY)
        if _ROTARY not in forward.__code__.co_names or not callable(theirs):
            continue
        if forward not in made:
            made[forward] = _calling(forward, theirs, place)
        if made[forward] is not None:
            module.forward = types.MethodType(made[forward], module)
            changed.append(module)

    return functools.partial(_put_back, changed)


def _calling(forward: types.FunctionType, theirs: Callable[..., Any], place: torch.device) -> Any:
    """`forward` with our rotary embedding in place of `theirs`; None where that computes something else."""
    whole, partly = (_rotates_halves(theirs, rotated, place) for rotated in (16, 8))
    if not whole:
        return None

    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Heads in another dimension, batches of several rows and broadcast angles are left to the model's function.
        usual = (not args and (not kwargs or kwargs == {"unsqueeze_dim": 1})) or args == (1,)
        if (
            usual
            and q.ndim == 4
            and q.shape[0] == 1
            and cos.shape[:-1] == (1, q.shape[2])
            and (cos.shape[-1] == q.shape[-1] or (partly and cos.shape[-1] < q.shape[-1]))
            and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
        ):
            return rotary(q, k, cos, sin)
        return theirs(q, k, cos, sin, *args, **kwargs)

    # Without a module name, torch.compile looks names up in these globals instead of in a module.
    scope = {**forward.__globals__, _ROTARY: apply}
    del scope["__name__"]
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _rotates_halves(function: Callable[..., Any], rotated: int, place: torch.device) -> bool:
    """Whether `function` turns the first `rotated` of 16 columns by halves, tried on random values."""
    random = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 5, 16), (1, 2, 5, 16), (1, 5, rotated), (1, 5, rotated))
    q, k, cos, sin = (torch.randn(shape, generator=random).to(place) for shape in shapes)
    try:
        found = function(q, k, cos, sin)
    except Exception:  # a function of this name may take other shapes or arguments
        return False
    if not isinstance(found, tuple) or len(found) != 2 or not all(torch.is_tensor(x) for x in found):
        return False
    for x, turned in zip((q, k), found, strict=True):
        first, second = x[..., :rotated].chunk(2, -1)
        expected = x.clone()
        expected[..., :rotated] = x[..., :rotated] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        if turned.shape != x.shape or not torch.allclose(turned, expected, rtol=1e-5, atol=1e-5):
            return False
    return True


def fuse_norms(model: torch.nn.Module) -> Undo:
    """Make norms of rows one pass in float32, rounded once, where their formula is one of ours; returns what undoes it.

    A module's own takes up to eight passes.
    """
    changed: list[torch.nn.Module] = []
    for module in model.modules():
        if "forward" not in vars(module) and (fused := _norm_of(module)) is not None:
            module.forward = fused
            changed.append(module)

    return functools.partial(_put_back, changed)


def _norm_of(module: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    """What computes the same as a norm, and a residual added to its input before if one is given; None for others."""
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    found = read_norm(module, len(weight))
    if found.kind is None or found.weight is None:
        return None
    kind, eps = found.kind, found.eps
    factor, shift = _as_stored(found.weight, weight.dtype), _as_stored(found.bias, weight.dtype)
    assert factor is not None

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return norm_rows(x, kind, factor, shift, eps, residual)

    return forward


def _as_stored(vector: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A vector in `dtype` where that holds its values, which Gemma's 1 + w are not: half the bytes to read."""
    if vector is None:
        return None
    stored = vector.to(dtype).contiguous()
    return stored if torch.equal(stored.float(), vector) else vector.float().contiguous()


def fuse_sums(model: torch.nn.Module) -> Undo:
    """Make BERT's blocks LayerNorm(dense(x) + residual) add and norm in one pass; returns what undoes it.

    The sum is float32, not rounded in between.
    """
    changed: list[torch.nn.Module] = []
    with torch.no_grad():
        for layer in model.modules():
            if "forward" not in vars(layer) and (fused := _sum_of(layer)) is not None:
                layer.forward = fused
                changed.append(layer)

    return functools.partial(_put_back, changed)


def _sum_of(layer: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    dense, norm = getattr(layer, "dense", None), getattr(layer, "LayerNorm", None)
    if type(dense) is not torch.nn.Linear or not isinstance(norm, torch.nn.Module):
        return None
    if list(inspect.signature(type(layer).forward).parameters) != ["self", "hidden_states", "input_tensor"]:
        return None
    normed = _norm_of(norm)
    if normed is None or norm.weight.shape != (dense.out_features,):
        return None

    def forward(hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return normed(dense(hidden_states), input_tensor)

    random = torch.Generator().manual_seed(0)
    place, dtype = dense.weight.device, dense.weight.dtype
    x, residual = (
        torch.randn((1, 3, n), generator=random).to(place, dtype) for n in (dense.in_features, dense.out_features)
    )
    return forward if _close(forward(x, residual), layer(x, residual)) else None


def merge_projections(model: torch.nn.Module) -> Undo:
    """Make queries', keys' and values' projections one product; returns what undoes it.

    An attention layer is handed the product in place of its hidden states, and its projections take their columns of
    it: nothing is kept between calls. The layers' own parameters are views of the joined weights. Projections that
    compute something else than a linear layer, as a pruned last layer's, are left alone.
    """
    undo: list[Undo] = []
    for module in model.modules():
        for names in _PROJECTIONS:
            parts = [getattr(module, name, None) for name in names]
            parameters = list(inspect.signature(type(module).forward).parameters)
            if not all(type(part) is torch.nn.Linear and "forward" not in vars(part) for part in parts):
                continue
            if _alike(parts) and parameters[1:2] == ["hidden_states"]:
                undo.append(_merge(module, parts))
    if undo and next(model.parameters()).is_cuda:
        torch.cuda.empty_cache()

    def put_back() -> None:
        for step in undo:
            step()

    return put_back


def _merge(module: torch.nn.Module, parts: list[Any]) -> Undo:
    weight, bias = _together(parts)
    whole, before = module.forward, vars(module).get("forward")
    begin = 0
    for part in parts:
        part.forward = functools.partial(_columns, begin=begin, end=begin + part.out_features)
        begin += part.out_features

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return whole(torch.nn.functional.linear(hidden_states, weight, bias), *args, **kwargs)

    module.forward = forward

    def put_back() -> None:
        for part in parts:
            del part.forward
        if before is None:
            del module.forward
        else:
            module.forward = before

    return put_back


def _columns(product: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return product[..., begin:end]


def fuse_gated_layers(model: torch.nn.Module) -> Undo:
    """Make gated feed-forward layers two products and one pass between them; returns what undoes it.

    The products of gate and factor become one, on weights that lie in memory together; the layers' own parameters are
    views of these, so that nothing is held twice and what is put back computes as before.
    """
    changed: list[torch.nn.Module] = []
    with torch.no_grad():
        for layer in model.modules():
            for names, act, down in _GATED:
                if "forward" not in vars(layer) and _fuse_gated(layer, names, act, down):
                    changed.append(layer)
    if changed and next(model.parameters()).is_cuda:
        torch.cuda.empty_cache()  # the freed memory of the old weights is in small pieces

    return functools.partial(_put_back, changed)


def _fuse_gated(layer: torch.nn.Module, names: tuple[str, ...], act: str, down: str) -> bool:
    """Fuse one layer with its parts under these names, if a random input proves that it is one; whether it is."""
    parts: list[Any] = [getattr(layer, name, None) for name in names]
    function, last = getattr(layer, act, None), getattr(layer, down, None)
    if not callable(function) or not isinstance(last, torch.nn.Module):
        return False
    if not all(type(part) is torch.nn.Linear for part in parts) or not _alike(parts):
        return False
    activation = activation_of(function)
    if activation is None:
        return False
    weight = parts[0].weight
    random = torch.Generator().manual_seed(0)
    sample = torch.randn((1, 3, weight.shape[1]), generator=random).to(weight.device, weight.dtype)
    expected = layer(sample)
    linear = torch.nn.functional.linear
    product = torch.cat([linear(sample, part.weight, part.bias) for part in parts], -1)
    if not torch.is_tensor(expected) or product.shape[-1] % 2 or not _close(last(gated(product, activation)), expected):
        return False
    weights, bias = _together(parts)

    def forward(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = last(gated(linear(x, weights, bias), activation))
        return result

    layer.forward = forward
    return True


def _put_back(changed: list[torch.nn.Module]) -> None:
    """Let modules run their class's forward again."""
    for module in changed:
        del module.forward


def _alike(parts: list[Any]) -> bool:
    """Whether linear layers can be one product: inputs, dtype, device, and all with a bias or all without."""
    kinds = {(part.in_features, part.weight.dtype, part.weight.device, part.bias is None) for part in parts}
    return len(kinds) == 1 and len({id(part.weight) for part in parts}) == len(parts)


def _together(parts: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of linear layers below each other; the layers' own become views of them."""
    if len(parts) == 1:
        return parts[0].weight.detach(), None if parts[0].bias is None else parts[0].bias.detach()
    joined: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            joined.append(None)
            continue
        with torch.inference_mode(False), torch.no_grad():  # parameters cannot be tensors of inference mode
            whole = torch.cat([tensor.detach() for tensor in tensors])
            for tensor, rows in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
                tensor.data = rows
        joined.append(whole)
    weight, bias = joined
    assert weight is not None
    return weight, bias


def _close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return ours.shape == expected.shape and relative_error(ours.double(), expected.double()) <= 0.02
