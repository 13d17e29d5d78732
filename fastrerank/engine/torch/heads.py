"""Heads in float32 on gathered rows: a transformers model's own, or a checkpoint's sentence-transformers modules."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fastrerank.engine.heads import DenseStep, Head, NormStep
from fastrerank.engine.torch.row import CannotPack

__all__ = ["ClassificationHead", "ModuleHead", "split_head"]

_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


class _Rows(torch.nn.Module):
    """Stands in a task model's backbone: gives back the hidden states that this thread has put there."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.pooler = copy.deepcopy(getattr(backbone, "pooler", None))
        self.pooler_activation = copy.deepcopy(getattr(backbone, "pooler_activation", None))
        self.given = threading.local()

    def forward(self, *_: Any, **__: Any) -> Any:
        states = self.given.states
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=self.pool(states))

    def pool(self, states: torch.Tensor) -> torch.Tensor | None:
        if self.pooler is None:
            return None
        if isinstance(self.pooler, torch.nn.Linear):  # ALBERT's pooler is a bare layer in the model
            pooled: torch.Tensor = self.pooler(states[:, 0])
            return pooled if self.pooler_activation is None else self.pooler_activation(pooled)
        result: torch.Tensor = self.pooler(states)
        return result


class ClassificationHead(torch.nn.Module):
    """What a `*ForSequenceClassification` computes from its backbone's hidden states, on one row per document.

    Attributes:
        readout: the row that the head reads, found by trying: "first", "last" or "mean"; None if it is none of them.
        skipped: token id that "last" passes over, as the decoders' classifiers pass over their padding token.
        width: number of labels.
    """

    def __init__(self, model: Any) -> None:
        """Take over `model`, whose backbone is replaced; the head becomes float32."""
        super().__init__()
        name = model.base_model_prefix
        self.rows = _Rows(getattr(model, name))
        self._check_pooler(getattr(model, name))
        setattr(model, name, self.rows)
        self.model = model.float().eval()
        # Some heads look for the last token that is not padding, so rows are given as tokens 1 of a text padded with 0.
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        model.config = copy.deepcopy(model.config)
        model.config.get_text_config().pad_token_id = 0
        self.readout = self._find_readout()
        self.skipped: int | None = pad if self.readout == "last" and self._skips_padding() else None
        self.width = self._logits(self._probe[:, :1]).shape[-1] if self.readout else 0

    @property
    def _probe(self) -> torch.Tensor:
        """(1, 5, hidden) states that no two readouts agree on."""
        hidden = self.model.config.get_text_config().hidden_size
        return torch.randn((1, 5, hidden), generator=torch.Generator().manual_seed(0))

    def _find_readout(self) -> str | None:
        """Return which rows the head reads: the readout that gives what all the rows give; None for none of ours."""
        states = self._probe
        expected = self._logits(states)
        candidates = {"first": states[:, :1], "last": states[:, -1:], "mean": states.mean(1, keepdim=True)}
        if expected.ndim != 2 or not torch.isfinite(expected).all():
            return None
        errors = {name: float((self._logits(rows) - expected).abs().max()) for name, rows in candidates.items()}
        found = [name for name, error in errors.items() if error <= 1e-4 * float(expected.abs().max())]
        return found[0] if len(found) == 1 else None

    @torch.inference_mode()
    def _check_pooler(self, backbone: Any) -> None:
        """Raise CannotPack if the backbone's pooled output is not what its copied pooler makes of its rows."""
        if self.rows.pooler is None:
            return
        ids = torch.ones((1, 2), dtype=torch.long)
        output = backbone(input_ids=ids, attention_mask=ids)
        pooled, ours = output.pooler_output, self.rows.pool(output.last_hidden_state)
        if ours is None or pooled.shape != ours.shape or not torch.allclose(pooled, ours, 1e-2, 1e-2, True):
            raise CannotPack(f"{type(backbone).__name__} pools its rows in a way of its own")

    def _skips_padding(self) -> bool:
        states, ids = self._probe, torch.tensor([[1, 1, 1, 0, 0]])
        return torch.allclose(self._logits(states, ids), self._logits(states[:, 2:3]), rtol=1e-4)

    @torch.inference_mode()
    def _logits(self, states: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        if ids is None:
            ids = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        self.rows.given.states = states
        try:
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            del self.rows.given.states
        return logits

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (N, labels) of float32 rows (N, hidden)."""
        return self._logits(rows[:, None])


class ModuleHead(torch.nn.Module):
    """A `Head` of modules (Dense, LayerNorm, Normalize) on float32 rows (N, hidden)."""

    def __init__(self, head: Head, hidden: int) -> None:
        super().__init__()
        self.readout: str = head.readout
        self.skipped: int | None = None
        self.width = hidden
        self._steps: list[Any] = []
        for number, step in enumerate(head.steps):
            if isinstance(step, DenseStep):
                if step.weight.shape[1] != self.width:
                    raise ValueError(f"head weight reads {step.weight.shape[1]} values, gets {self.width}")
                self._add(number, "weight", _float32(step.weight))
                self._add(number, "bias", step.bias)
                self.width = len(step.weight)
            elif isinstance(step, NormStep):
                if len(step.gamma) != self.width:
                    raise ValueError(f"head norm has {len(step.gamma)} weights, gets {self.width} values")
                self._add(number, "weight", step.gamma)
                self._add(number, "bias", step.beta)
            self._steps.append(step)

    def _add(self, number: int, name: str, values: Any) -> None:
        tensor = None if values is None else torch.tensor(values, dtype=torch.float32)
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError("weight of head is NaN or infinite: the checkpoint is damaged")
        self.register_buffer(f"{name}{number}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Values (N, width)."""
        for number, step in enumerate(self._steps):
            weight: Any = getattr(self, f"weight{number}", None)
            bias: Any = getattr(self, f"bias{number}", None)
            if isinstance(step, DenseStep):
                x = _ACTIVATIONS[step.activation](torch.nn.functional.linear(x, weight, bias))
            elif isinstance(step, NormStep):
                x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, step.eps)
            else:
                x = torch.nn.functional.normalize(x, dim=-1)
        return x


def _float32(raw: Any) -> Any:
    """Stored weights as float32; bfloat16 is stored as the upper halves of float32."""
    return raw if raw.dtype.kind == "f" else (raw.astype("u4") << 16).view("f4")


def split_head(model: Any) -> tuple[Any, ClassificationHead | None, str]:
    """Return (backbone, head, "") of a task model, or (model, None, why not) if its head cannot run on single rows.

    Pooling layers that a family keeps in its backbone are copied to the head. The head's layers become float32.
    """
    name = type(model).__name__
    backbone = getattr(model, model.base_model_prefix, None)
    if backbone is None or getattr(model.config, "is_encoder_decoder", False):
        return model, None, f"{name} has no separate encoder"
    task = copy.copy(model)  # the caller's model keeps its backbone
    task._modules = dict(model._modules)
    try:
        head = ClassificationHead(task)
    except Exception as error:  # the model's own code may raise anything on rows that it did not compute
        return model, None, f"the head of {name} does not run on gathered rows ({type(error).__name__}: {error})"
    if head.readout is None:
        return (
            model,
            None,
            f"the head of {name} overflows, or reads neither the first, nor the last, nor the mean of all tokens",
        )
    return backbone, head, ""
