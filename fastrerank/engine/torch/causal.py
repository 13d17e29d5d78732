"""Label logits of a decoder: one packed forward per batch of prompts, common prefixes once, K rows of the head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.modeling_layers import GenericForSequenceClassification

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.batch import Batch, distinct
from fastrerank.engine.memory import CPU_DECODER_TOKENS
from fastrerank.engine.readouts import Rows
from fastrerank.engine.torch.decoder import PackedDecoder
from fastrerank.engine.torch.loading import cast_parameters, load_model
from fastrerank.engine.torch.model import Model, place
from fastrerank.engine.torch.placement import place_on
from fastrerank.engine.torch.probe import probe_tokens
from fastrerank.engine.torch.row_norms import FinalNorm
from fastrerank.engine.usage import Cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.engine.torch.model import Where

__all__ = ["CausalScorer", "LabelEncoder", "Probes"]

log = logging.getLogger("fastrerank")

Ids = npt.NDArray[np.integer]
# Relative difference from transformers' own logits that passes when a model is loaded.
_AGREES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


class LabelHead:
    """K rows of a decoder's head on normed hidden states, in float32: equals the head's logits at these labels.

    Args:
        weight: (V, hidden) rows as stored; only those asked for are ever read. bias: (V,) or None.
        norm: what stands between the last layer and the head.
        scale, softcap: as `ops.label_logits` takes them.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: FinalNorm,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        self.weight, self.bias, self.norm, self.scale, self.softcap = weight, bias, norm, scale, softcap
        self._rows: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, hidden: torch.Tensor, labels: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return float32 (N, K) of hidden states (N, hidden) before the norm; `labels` is (K,)."""
        weight, bias = self._sliced(labels, hidden.device)
        norm = self.norm
        if norm.module is not None:
            hidden = norm.module(hidden.float())
        return ops.label_logits(
            hidden,
            weight,
            norm=norm.kind,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            bias=bias,
            scale=self.scale,
            softcap=self.softcap,
        )

    def _sliced(self, labels: npt.NDArray[np.int64], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = labels.tobytes()
        if key not in self._rows:
            chosen = torch.from_numpy(labels).to(self.weight.device)
            bias = None if self.bias is None else self.bias[chosen].float().to(device)
            self._rows[key] = (self.weight[chosen].float().to(device), bias)
        return self._rows[key]


class CausalScorer:
    """Logits of a decoder's head at the last token of prompts: equals transformers' logits on each prompt alone.

    One object may be called from many threads.

    Attributes:
        model: the model that is run; its `budget`, `shares` and `max_length` are read at each call.
        labels: how many labels the head has: the vocabulary's size, or a classifier's.
        skipped: token id that is skipped at the end of prompts, as classifiers skip padding; None for none.
    """

    def __init__(self, model: Model, head: LabelHead) -> None:
        self.model, self._head = model, head
        self.dtype, self.device, self.num_threads = model.dtype, model.device, model.num_threads
        self.labels = len(head.weight)
        self.skipped: int | None = None

    @property
    def max_length(self) -> int | None:
        """Return the tokens that the model's positions allow; None where its config names no limit."""
        return self.model.max_length

    @property
    def reason(self) -> str:
        """Return why prompts run padded and share nothing; "" where they run packed."""
        return self.model.reason

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, share_prefixes: bool = True, head: str = "causal", **where: Unpack[Where]
    ) -> CausalScorer:
        """Load a decoder through transformers.

        Args:
            checkpoint: opened checkpoint of a `*ForCausalLM`, or with head="classification" of a
                `*ForSequenceClassification` that reads its last token.
            share_prefixes: whether common prefixes of a call's prompts are computed once.
            where: dtype, device, num_threads, memory_limit; see `Where`. Norm, head and logits are float32 in all
                precisions of the backbone.

        Raises ValueError for a checkpoint without the head, without some of its weights, with weights that are NaN, or
        whose logits are not what its class computes.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint             # doctest: +SKIP
            >>> scorer = CausalScorer.load(open_checkpoint("path"))           # doctest: +SKIP
        """
        ops.num_threads(where.get("num_threads"))  # checks it
        loaded = load_model(checkpoint, head, where.get("dtype", "float32"))
        return cls.from_model(loaded, share_prefixes=share_prefixes, head=head, **where)

    @classmethod
    def from_model(
        cls, model: Any, *, share_prefixes: bool = True, head: str = "causal", **where: Unpack[Where]
    ) -> CausalScorer:
        """Take over a transformers model in evaluation mode; arguments as in `load`. The model is changed for good.

        Raises ValueError for a model without a linear head, or whose logits are not what its class computes.
        """
        backbone = getattr(model, model.base_model_prefix)
        cast_parameters(backbone, getattr(torch, where.get("dtype", "float32")))
        _, linear = _head_module(model, head)
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        probes = Probes(backbone.config.get_text_config(), len(weight))
        with torch.inference_mode(), place_on(where.get("num_threads"), weight.device):
            expected = probes.expected(model, head)
        scorer = cls.build(backbone, weight, bias, probes, expected, share_prefixes=share_prefixes, **where)
        if head == "classification":
            scorer.skipped = getattr(backbone.config.get_text_config(), "pad_token_id", None)
        return scorer

    @classmethod
    def build(
        cls,
        backbone: Any,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        probes: Probes,
        expected: npt.NDArray[np.float64],
        *,
        share_prefixes: bool,
        **where: Unpack[Where],
    ) -> CausalScorer:
        """Put a backbone and head rows on a device, and prove them against what `probes` are `expected` to give."""
        runner, reason = place(backbone, **where)
        norm, decoder = FinalNorm(None), False
        if runner.packed:
            try:
                runner = PackedDecoder(runner)
                norm, decoder = runner.norm, True
            except ValueError as error:
                reason = str(error)
        model = Model(
            runner,
            on_cpu=CPU_DECODER_TOKENS,
            reason=reason,
            shares=share_prefixes and decoder,
            noun="prompt",
            **where,
        )
        options = _logit_options(backbone.config.get_text_config())
        scorer = cls(model, LabelHead(weight, bias, norm, **options))
        difference = probes.error(scorer, expected)
        if difference > _AGREES[model.dtype] and decoder:
            runner.prunes = False
            log.info("%s computes all rows of its last layer", type(backbone).__name__)
            difference = probes.error(scorer, expected)
        if difference > _AGREES[model.dtype]:
            raise ValueError(
                f"label logits of {type(backbone).__name__} differ by {difference:.2g} from its own head's: it does "
                "something to logits that its config does not name in a known way"
            )
        return scorer

    def label_logits(self, prompts: Sequence[Ids], labels: Ids) -> tuple[npt.NDArray[np.float32], Cost]:
        """Return (logits, cost): float32 (N, K) of the head's rows `labels` at the last token of each prompt.

        Args:
            prompts: N sequences of token ids. Equal prompts are computed once, as is what prompts begin with alike.
            labels: (K,) rows of the head: token ids, or classes.

        Raises ValueError naming a prompt that is empty, longer than `max_length` or has ids outside the vocabulary.
        """
        chosen = np.asarray(labels, np.int64)
        if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= self.labels:
            raise ValueError(f"labels must be a list of numbers from 0 to {self.labels - 1}, got {chosen}")
        self.model.check(Batch.of_ids(prompts))
        if not len(prompts):
            return np.zeros((0, len(chosen)), np.float32), Cost()
        if self.skipped is not None:
            prompts = [self._without_padding(np.asarray(ids)) for ids in prompts]
        batch, numbers = distinct(prompts)
        values, cost = self.model.run(batch, Rows.last(batch), lambda hidden: self._head(hidden, chosen), on_host=True)
        return np.asarray(values.numpy(), np.float32)[numbers], cost

    def _without_padding(self, ids: Ids) -> Ids:
        content = np.flatnonzero(ids != self.skipped)
        return ids[: content[-1] + 1] if len(content) else ids[:1]


class LabelEncoder:
    """A decoder's logits at each document's last token, with the face of an encoder.

    What a call's documents begin with alike is computed once. With `labels`, one or two token ids of a language model,
    equals sentence-transformers' LogitScore module: the logit of the first, less the second's where there are two.
    Without, equals a classifier: all its labels.

    Attributes:
        width: values per document.
    """

    readout = "last"

    def __init__(self, scorer: CausalScorer, labels: Sequence[int] | None = None) -> None:
        self._scorer = scorer
        self._labels = np.arange(scorer.labels) if labels is None else np.array(labels, np.int64)
        self._difference = labels is not None and len(labels) == 2
        self.width = 1 if labels is not None else scorer.labels
        self.dtype, self.num_threads = scorer.dtype, scorer.num_threads

    @classmethod
    def load(cls, checkpoint: Checkpoint, labels: Sequence[int] | None = None, **options: Any) -> LabelEncoder:
        """Load a `*ForCausalLM` for `labels`, else a decoder's `*ForSequenceClassification`.

        `options` are those of `CausalScorer.load`. Raises ValueError for other classifiers, and as it does.
        """
        if labels is not None:
            return cls(CausalScorer.load(checkpoint, **options), labels)
        name = (checkpoint.config.get("architectures") or [""])[0]
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, GenericForSequenceClassification)):
            raise ValueError(f"{checkpoint.path} is no decoder classifier of transformers' common kind")
        scorer = CausalScorer.load(checkpoint, head="classification", **options)
        scorer.model.max_length = None  # rotary positions: like transformers, it reads what it is given
        return cls(scorer)

    def forward(
        self, ids: npt.NDArray[np.int32], type_ids: npt.NDArray[np.int32] | None, offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return float32 (N, width) of N documents of T tokens in all, packed one after the other; types are unused."""
        return self.counted(ids, type_ids, offsets)[0]

    def counted(
        self,
        ids: npt.NDArray[np.int32],
        type_ids: npt.NDArray[np.int32] | None,  # noqa: ARG002
        offsets: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.float32], Cost]:
        """What `forward` returns, and what it cost."""
        prompts = np.split(np.asarray(ids), np.asarray(offsets)[1:-1]) if len(offsets) > 1 else []
        logits, cost = self._scorer.label_logits(prompts, self._labels)
        return (logits[:, :1] - logits[:, 1:] if self._difference else logits), cost


def _head_module(model: Any, head: str) -> tuple[str, torch.nn.Linear]:
    """The model's head and its name, for head="causal" or "classification"."""
    wanted = model.get_output_embeddings() if head == "causal" else None
    found = [
        (name, module)
        for name, module in model.named_children()
        if isinstance(module, torch.nn.Linear) and (wanted is None or module is wanted)
    ]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has no single linear head")
    return found[0]


def _logit_options(config: Any) -> dict[str, float]:
    """What families do to logits, by the names of their configs."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": float(getattr(config, "final_logit_softcapping", None) or 0.0)}


class Probes:
    """Short prompts of random tokens: what the model itself says of them, and how far a scorer is from it."""

    def __init__(self, config: Any, labels: int) -> None:
        usable = probe_tokens(config)
        generator = np.random.default_rng(0)
        # There are more tokens, padding included, than rows that are read: a layer that mixes them up does not pass.
        shared = generator.choice(usable, 30)
        self.prompts = [np.concatenate([shared, generator.choice(usable, n)]) for n in (20, 25, 1)]
        self.labels = np.unique(np.linspace(0, labels - 1, min(labels, 16)).astype(np.int64))

    def expected(self, model: Any, head: str) -> npt.NDArray[np.float64]:
        """Return what the model itself says of the labels. Its head is cut to their rows, for good, and cast to it."""
        name, whole = _head_module(model, head)
        chosen = torch.from_numpy(self.labels).to(whole.weight.device)
        few = torch.nn.Linear(
            whole.in_features,
            len(chosen),
            whole.bias is not None,
            device=model.device,
            dtype=next(getattr(model, model.base_model_prefix).parameters()).dtype,
        )
        few.weight.copy_(whole.weight[chosen])
        if whole.bias is not None:
            few.bias.copy_(whole.bias[chosen])
        setattr(model, name, few)
        rows = []
        for ids in self.prompts:
            tensor = torch.from_numpy(ids)[None].to(model.device)
            logits = model(tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits
            rows.append((logits[0, -1] if head == "causal" else logits[0]).double().cpu().numpy())
        return np.stack(rows)

    def error(self, scorer: CausalScorer, expected: npt.NDArray[np.float64]) -> float:
        try:
            logits, _ = scorer.label_logits(self.prompts, self.labels)
        except RuntimeError as error:
            log.debug("probes failed: %s", error)
            return float("inf")
        return float(np.linalg.norm(logits - expected) / max(np.linalg.norm(expected), 1e-30))
