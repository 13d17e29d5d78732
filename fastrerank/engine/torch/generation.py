"""A transformers decoder that writes text: left-padded batches, sampling that does not depend on the batch."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.loading import plan
from fastrerank.engine.torch.loading import cast_parameters, load_model, one_error, quiet
from fastrerank.inputs.screening import load_fast

__all__ = ["CausalGenerator", "load_causal"]

_GenerationConfig: Any = transformers.GenerationConfig


def load_causal(checkpoint: Checkpoint, device: Any, dtype: Any) -> CausalGenerator:
    """Load the checkpoint's causal language model and tokenizer.

    Raises ValueError for a checkpoint that is no decoder with a language model head, or lacks weights.
    """
    chosen = plan(checkpoint.config, "torch", device, dtype)
    if len(chosen.devices) != 1:
        raise ValueError(f"device must be one device for generation, got {list(chosen.devices)}")
    model = load_model(checkpoint, "causal", chosen.dtype)
    with quiet(), one_error(checkpoint.path):
        tokenizer = load_fast(checkpoint.transformer_path, trust_remote_code=checkpoint.trust_remote_code)
    cast_parameters(model, getattr(torch, chosen.dtype))
    return CausalGenerator(model.to(chosen.devices[0]), tokenizer, chosen.devices[0], chosen.dtype)


class CausalGenerator:
    """Equal to `model.generate` for each row of ids alone: the padding in front is masked and has no position.

    Example:
        >>> load_causal(open_checkpoint("path"), "cpu", "auto").generate([[1, 5]], 9, 0.0, 1.0, [0], (), 24)
        ... # doctest: +SKIP
    """

    def __init__(self, model: Any, tokenizer: Any, device_name: str, dtype_name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device_name, self.dtype_name = device_name, dtype_name
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        # The checkpoint's own settings (temperature, penalties) would change what the caller asks for.
        model.generation_config = _GenerationConfig()
        self._tokenizer_lock = threading.Lock()

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens' text, without special tokens."""
        with self._tokenizer_lock:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: Sequence[str],
        tail: int,
    ) -> list[tuple[list[int], list[float]]]:
        """Return (new tokens without the end token, their log probabilities under the model) of each row of ids."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        choice = _Choice(temperature, top_p, seeds)
        padding = self.ends[0] if self.ends else 0
        config = _GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.ends or None, pad_token_id=padding
        )
        criteria = [_Stop(self, stop, longest, tail)] if stop else []
        output = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([choice]),
            stopping_criteria=transformers.StoppingCriteriaList(criteria),
        )
        logs = torch.stack(choice.logs, dim=1).tolist()
        answers = []
        for i, tokens in enumerate(output[:, longest:].tolist()):
            end = next((j for j, token in enumerate(tokens) if token in self.ends), len(tokens))
            if stop:
                end = min(end, self._stopped(tokens[:end], stop))
            answers.append((tokens[:end], logs[i][:end]))
        return answers

    def _stopped(self, tokens: list[int], stop: Sequence[str]) -> int:
        """How many tokens there are up to the one that completes a stop string; rows that ended earlier are padded."""

        def stopped(count: int) -> bool:
            text = self.text(tokens[:count])
            return any(string in text for string in stop)

        return bisect_left(range(len(tokens)), True, key=stopped)


class _Choice(transformers.LogitsProcessor):
    """Leaves one token per row to the greedy search: the largest, or the one that its own random numbers draw.

    The largest of logits / temperature + Gumbel noise is a draw from their softmax.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.logs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        scores = scores.float()
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise FloatingPointError(
                "the model's logits are NaN or infinite: the weights are damaged or overflow in this precision "
                "(try dtype='float32')"
            )
        drawn = scores
        if self.temperature > 0:
            drawn = scores / self.temperature
            if self.top_p < 1:
                drawn = _nucleus(drawn, self.top_p)
            uniform = torch.stack([torch.rand(scores.shape[-1], generator=each) for each in self.random])
            drawn = drawn - (-uniform.to(drawn.device).clamp_min(1e-30).log()).log()
        token = drawn.argmax(dim=-1)
        chosen = scores.gather(1, token[:, None])[:, 0]
        self.logs.append((chosen - scores.logsumexp(dim=-1)).cpu())
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest largest logits whose probabilities reach top_p; the others become -inf."""
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    chances = ordered.softmax(dim=-1)
    beyond = chances.cumsum(dim=-1) - chances >= top_p
    return torch.full_like(logits, -torch.inf).scatter(1, places, ordered.masked_fill(beyond, -torch.inf))


class _Stop(transformers.StoppingCriteria):
    """Ends a row whose last tokens hold a stop string."""

    def __init__(self, owner: CausalGenerator, stop: Sequence[str], prompt: int, tail: int) -> None:
        self.owner, self.stop, self.prompt, self.tail = owner, stop, prompt, tail

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        recent = input_ids[:, max(self.prompt, input_ids.shape[1] - self.tail) :].tolist()
        texts = [self.owner.text(row) for row in recent]
        done = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
