"""Label logits of T5 rerankers: the encoder on padded batches, one decoder step on absorbed cross attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.batch import Batch, distinct
from fastrerank.engine.memory import CPU_TOKENS
from fastrerank.engine.readouts import Readout, Rows
from fastrerank.engine.torch.loading import cast_parameters, load_model
from fastrerank.engine.torch.model import Model
from fastrerank.engine.torch.padded import PaddedBackbone
from fastrerank.engine.torch.placement import place_on
from fastrerank.engine.torch.probe import AGREES, relative_error, runner_of
from fastrerank.engine.usage import Cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.engine.torch.model import Where

__all__ = ["Seq2SeqScorer"]

Ids = npt.NDArray[np.integer]
_EXPECTED = "T5ForConditionalGeneration or a model built like it (mT5, UMT5)"


class Seq2SeqScorer:
    """Logits of the first token that a T5 would write: equals transformers' logits on each prompt alone.

    monoT5 (arXiv 2003.06713), duoT5 (2101.05667), RankT5 (2210.10634: label <extra_id_10>, id 32089), and PRP and
    setwise prompts of Flan-T5 (2306.17563, 2310.09497). One object may be called from many threads.

    Attributes:
        max_length: most tokens of a prompt: what the checkpoint states; None for no limit. T5's positions are relative
            and have no end: set another number, or None, to score longer prompts.
        decoder_prefix: what the decoder is made to have written, after its start token.
        model: the model that is run; tokens of its `budget` are counted with padding.
        reason: why prompts of different lengths share no batch; "" where they do.
    """

    def __init__(self, model: Model, norm: Any, weight: torch.Tensor, scale: float) -> None:
        self.model, self._norm, self._weight, self.scale = model, norm, weight, scale
        self.dtype, self.device = model.dtype, model.device
        self.max_length: int | None = None
        self.decoder_prefix = tuple(model.runner.start[1:].tolist())
        self.labels = len(weight)
        self.reason = model.reason

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, decoder_prefix: Sequence[int] = (), **where: Unpack[Where]
    ) -> Seq2SeqScorer:
        """Load a T5 through transformers.

        Args:
            checkpoint: opened checkpoint of a `T5ForConditionalGeneration` or its like.
            decoder_prefix: token ids that the decoder sees after its start token: logits are of what comes next. PRP
                with T5 makes it start with "Passage".
            where: dtype, device, num_threads, memory_limit; see `Where`. float16 keeps the output layers of the
                feed-forward blocks in float32, as transformers does; final norm and logits are float32.

        Raises ValueError for another architecture, weights that are missing or NaN, a prefix outside the vocabulary,
        and a model whose logits are not what its class computes.

        Example:
            >>> from fastrerank.checkpoints.checkpoint import open_checkpoint             # doctest: +SKIP
            >>> scorer = Seq2SeqScorer.load(open_checkpoint("path"))          # doctest: +SKIP
        """
        threads, dtype = where.get("num_threads"), where.get("dtype", "float32")
        ops.num_threads(threads)  # checks it
        loaded = load_model(checkpoint, "seq2seq", dtype)
        start = _start(loaded, decoder_prefix)
        weight, device = loaded.lm_head.weight.detach(), torch.device(where.get("device", "cpu"))
        probes = _Probes(loaded, start)
        cast_parameters(loaded, getattr(torch, dtype))
        with torch.inference_mode(), place_on(threads, device):
            loaded.to(device)
            expected = probes.expected(loaded)
        runner, reason = runner_of(loaded.encoder, dtype, False, num_threads=threads)
        reason = "" if runner.pads else reason.partition("; ")[2]
        model = Model(
            DecoderStep(runner, loaded.decoder, start), on_cpu=CPU_TOKENS, reason=reason, noun="prompt", **where
        )
        model.max_length = None  # positions are relative and have no end
        norm = loaded.decoder.final_layer_norm
        scorers = [cls(model, norm, weight, scale) for scale in (1.0, loaded.config.d_model**-0.5)]
        errors = [probes.error(scorer, expected) for scorer in scorers]
        if not min(errors) <= AGREES[dtype]:  # false for NaN
            raise ValueError(
                f"label logits of {type(loaded).__name__} differ by {min(errors):.2g} from its own: it is not built as "
                f"{_EXPECTED}"
            )
        chosen = scorers[int(np.argmin(errors))]
        chosen.max_length = checkpoint.max_seq_length
        return chosen

    def label_logits(self, prompts: Sequence[Ids], labels: Ids) -> tuple[npt.NDArray[np.float32], Cost]:
        """Return (logits, cost): float32 (N, K) of the vocabulary's rows `labels` after each prompt and the prefix.

        Args:
            prompts: N sequences of token ids as the encoder reads them, end token included. Equal prompts are computed
                once.
            labels: (K,) token ids, or (N, K) with others for each prompt.

        A prompt's logits depend on its company by rounding only: other lengths in a batch, other sums. Cost counts
        tokens as the network computed them: the encoder's with padding, and the decoder's.

        Raises ValueError naming a prompt that is empty, longer than `max_length` or has ids outside the vocabulary.
        """
        chosen = np.asarray(labels)
        self._check(prompts, chosen)
        if not len(prompts):
            return np.zeros((0, chosen.shape[-1]), np.float32), Cost()
        batch, place = distinct(prompts)
        states, cost = self.model.run(batch, Rows.last(batch), on_host=True)
        rows, at = np.unique(chosen, return_inverse=True)
        norm = self._norm
        logits = ops.label_logits(
            states[torch.from_numpy(place)],
            self._weight[torch.from_numpy(rows)],
            norm="rms",
            norm_weight=norm.weight.detach().cpu(),
            eps=norm.variance_epsilon,
            scale=self.scale,
        ).numpy()
        at = np.broadcast_to(at.reshape(chosen.shape), (len(place), chosen.shape[-1]))
        return np.take_along_axis(logits, at, 1), cost

    def _check(self, prompts: Sequence[Ids], labels: Ids) -> None:
        shaped = labels.ndim == 1 or (labels.ndim == 2 and len(labels) == len(prompts))
        if not shaped or not labels.shape[-1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be integers (K,) or ({len(prompts)}, K), K at least 1, got {labels.dtype} {labels.shape}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < self.labels:
            raise ValueError(f"labels must be from 0 to {self.labels - 1}, got {labels.min()} to {labels.max()}")
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompt {i} has no tokens")
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens, {len(ids) - self.max_length} more than max_length, "
                    f"{self.max_length}; cut its documents, or set max_length: T5 has no last position"
                )
        self.model.check(Batch.of_ids(prompts))


class DecoderStep:
    """Runs prompts through the encoder and `start` through the decoder: its last state before the final norm.

    Cross attention never makes keys and values of the encoder's tokens, which would be a sixth of the encoder's work:
    with R rows in the decoder, q_r . (W_K e_t) = (W_K^T q_r) . e_t and sum_t p_rt W_V e_t = W_V sum_t p_rt e_t, head by
    head. It has no position bias in T5. Scores, weights and sums are float32.
    """

    packed = False

    def __init__(self, encoder: PaddedBackbone, decoder: Any, start: torch.Tensor) -> None:
        self._encoder, self._decoder, self.start = encoder, decoder, start.to(encoder.device)
        self.backbone, self.device, self.pads = encoder.backbone, encoder.device, encoder.pads
        self.decoded_tokens = len(start)

    def read(self, batch: Batch, readout: Readout) -> torch.Tensor:  # noqa: ARG002
        """Return the decoder's last states of a batch's prompts, float32 (N, hidden), whatever the readout."""
        inputs, _ = self._encoder.inputs(batch)
        states = self.backbone(**inputs)[0]
        return self.decode(states, inputs["attention_mask"].bool())

    def decode(self, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return float32 (n, hidden) of encoder states (n, L, hidden), of which `seen` (n, L) are no padding."""
        wide = states.float()
        x = self._decoder.embed_tokens(self.start)[None].expand(len(states), -1, -1)
        bias = None
        for block in self._decoder.block:
            own, cross, feed = block.layer
            if own.SelfAttention.has_relative_attention_bias:
                rows = len(self.start)
                bias = own.SelfAttention.compute_bias(rows, rows, device=self.device)
            x = _clamped(x + _own_attention(own.SelfAttention, own.layer_norm(x), bias))
            x = _clamped(x + _absorbed_attention(cross.EncDecAttention, cross.layer_norm(x), wide, seen))
            x = _clamped(feed(x))
        last: torch.Tensor = x[:, -1].float()
        return last


def _own_attention(attention: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """T5's causal self-attention of x (n, R, hidden): scores are not scaled, `bias` (1, H, R, R) is added."""
    split = (*x.shape[:2], attention.n_heads, attention.key_value_proj_dim)
    q, k, v = (layer(x).view(split).transpose(1, 2) for layer in (attention.q, attention.k, attention.v))
    scores = q.float() @ k.float().transpose(2, 3)
    if bias is not None:
        scores = scores + bias.float()
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    out: torch.Tensor = attention.o((weights @ v.float()).to(x.dtype).transpose(1, 2).flatten(2))
    return out


def _absorbed_attention(attention: Any, x: torch.Tensor, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """T5's cross attention of x (n, R, hidden) to float32 `states` (n, L, hidden), W_K and W_V taken to x's side."""
    heads, size = attention.n_heads, attention.key_value_proj_dim
    n, rows, _ = x.shape
    by_head = (heads, size, states.shape[2])
    q = attention.q(x).view(n * rows, heads, size).transpose(0, 1)  # (H, n R, D)
    query = (q @ attention.k.weight.view(by_head)).float()  # (H, n R, hidden)
    query = query.view(heads, n, rows, -1).transpose(0, 1).flatten(1, 2)  # (n, H R, hidden)
    scores = (query @ states.transpose(1, 2)).masked_fill(~seen[:, None], float("-inf"))
    mean = scores.softmax(-1) @ states  # (n, H R, hidden)
    mean = mean.view(n, heads, rows, -1).transpose(0, 1).flatten(1, 2).to(x.dtype)  # (H, n R, hidden)
    value = mean @ attention.v.weight.view(by_head).transpose(1, 2)  # (H, n R, D)
    out: torch.Tensor = attention.o(value.view(heads, n, rows, size).permute(1, 2, 0, 3).flatten(2))
    return out


def _clamped(x: torch.Tensor) -> torch.Tensor:
    """float16 states in the range that transformers' T5 keeps them in; NaN stays."""
    most = torch.finfo(torch.float16).max - 1000
    return x.clamp(-most, most) if x.dtype == torch.float16 else x


class _Probes:
    """Short prompts of random tokens: what the model itself says of some labels, and how far a scorer is from it."""

    def __init__(self, model: Any, start: torch.Tensor) -> None:
        vocabulary = int(model.config.vocab_size)
        generator = np.random.default_rng(0)
        usable = np.arange(2, min(vocabulary, 1000)) if vocabulary > 3 else np.arange(vocabulary)
        self.prompts = [generator.choice(usable, n).astype(np.int64) for n in (12, 5, 21)]
        self.labels = np.unique(np.linspace(0, vocabulary - 1, min(vocabulary, 16)).astype(np.int64))
        self._start = start
        # The labels' rows replace the whole head, which then need not be on the device.
        few = torch.nn.Linear(model.config.d_model, len(self.labels), bias=False)
        few.weight = torch.nn.Parameter(model.lm_head.weight.detach()[torch.from_numpy(self.labels)], False)
        model.lm_head = few

    def expected(self, model: Any) -> torch.Tensor:
        """Return float64 (prompts, labels) of the model's own forward, one prompt at a time."""
        device = model.device
        start = self._start[None].to(device)
        rows = [
            model(input_ids=torch.from_numpy(ids)[None].to(device), decoder_input_ids=start, use_cache=False).logits
            for ids in self.prompts
        ]
        return torch.cat([row[:, -1] for row in rows]).double().cpu()

    def error(self, scorer: Seq2SeqScorer, expected: torch.Tensor) -> float:
        """Return the relative error of a scorer on the same prompts, together."""
        logits, _ = scorer.label_logits(self.prompts, self.labels)
        return relative_error(torch.from_numpy(logits).double(), expected)


def _start(model: Any, prefix: Sequence[int]) -> torch.Tensor:
    """The decoder's input, after checks that the model is built as T5 is."""
    decoder = getattr(model, "decoder", None)
    parts = [getattr(decoder, name, None) for name in ("embed_tokens", "block", "final_layer_norm")]
    head: Any = getattr(model, "lm_head", None)
    if any(part is None for part in (*parts, getattr(model, "encoder", None), head)) or head.bias is not None:
        raise ValueError(f"label logits of an encoder-decoder need {_EXPECTED}, got {type(model).__name__}")
    config = model.config
    named = [getattr(config, "decoder_start_token_id", None), model.generation_config.decoder_start_token_id]
    first = next((token for token in (*named, config.pad_token_id) if isinstance(token, int)), None)
    if first is None:
        raise ValueError("config.json must name decoder_start_token_id or pad_token_id, it names neither")
    wrong = [token for token in prefix if not 0 <= int(token) < config.vocab_size]
    if wrong:
        raise ValueError(
            f"decoder_prefix must be token ids below the vocabulary's size {config.vocab_size}, got {wrong[0]!r}"
        )
    return torch.tensor([first, *(int(token) for token in prefix)])
