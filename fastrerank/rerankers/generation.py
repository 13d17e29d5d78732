"""Text from a model, for the methods that read a written answer: a small protocol and its transformers form.

Anything that maps prompts to texts serves as `generate`: an HTTP client reads `prompt.messages`, a local model
`prompt.ids`. This module imports torch only when a `TransformersGenerator` is made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.runtime.naming import model_name
from fastrerank.runtime.types import DeviceLike, DtypeLike

__all__ = ["INTEGER", "Generate", "Prompt", "TransformersGenerator", "room_to_write"]

INTEGER = re.compile(r"[0-9]+")
# Tokens that are decoded again at each step to look for a stop string: longer than any stop string.
_TAIL = 24


class Prompt(Protocol):
    """What a prompt must have to be answered: see `fastrerank.inputs.prompts.Prompt`."""

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Token ids, (n,)."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """Roles and contents, as chat services take them."""


class Generate(Protocol):
    """Answers prompts with texts: one str per prompt, in their order. May be called from several threads."""

    def __call__(self, prompts: Sequence[Any], /) -> list[str]: ...


class TransformersGenerator:
    """Equal to `AutoModelForCausalLM.generate` on each prompt alone, in left-padded batches.

    Greedy at temperature 0. Above it, each prompt draws from its own random numbers, seeded by `seed` and its token
    ids: what it is answered depends neither on the batch nor on the order. Call the object, or `generate`.

    Args:
        model: hub id or local folder of a decoder with a language model head and a tokenizer.
        max_new_tokens: most tokens of an answer.
        temperature, top_p: sampling; the checkpoint's own generation_config is not applied, but for its eos tokens.
        seed: of the sampling.
        stop: strings that end an answer, such as "</answer>"; the answer keeps them. At most 24 characters.
        batch_size: prompts that are answered at once; the memory for keys and values grows with it.
        device: "cpu", "cuda", "cuda:1"; None: a usable GPU, else the CPU.
        dtype: "float32", "bfloat16", "float16"; "auto": float32 on a CPU, bfloat16 on a GPU.
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.

    Raises ValueError naming the argument that is wrong.

    Example:
        >>> generator = TransformersGenerator("path/to/Qwen3-4B", max_new_tokens=200)    # doctest: +SKIP
        >>> ListwiseReranker("path/to/Qwen3-4B", template="rankgpt", generate=generator)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        batch_size: int = 16,
        device: DeviceLike | None = None,
        dtype: DtypeLike = "auto",
        revision: str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and 0 < len(text) <= _TAIL for text in stop):
            raise ValueError(f"stop must hold strings of 1 to {_TAIL} characters, got {stop!r}")
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        self.stop, self.batch_size = stop, batch_size

        from fastrerank.engine.torch.generation import load_causal

        checkpoint = open_checkpoint(
            model,
            revision=revision,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        self.checkpoint = checkpoint
        self.engine = load_causal(checkpoint, device, dtype)
        self.device, self.dtype = self.engine.device_name, self.engine.dtype_name

    def __repr__(self) -> str:
        name, sampling = model_name(self.checkpoint.path), f"temperature={self.temperature}"
        return f"TransformersGenerator({name!r}, dtype={self.dtype!r}, device={self.device!r}, {sampling})"

    def __call__(self, prompts: Sequence[Prompt], /) -> list[str]:
        return self.generate(prompts)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return one text per prompt, without special tokens.

        Raises ValueError for an empty prompt and for one that leaves no room for `max_new_tokens`.
        """
        return [self.engine.text(tokens) for tokens, _ in self._answers(prompts)]

    def generate_scored(self, prompts: Sequence[Prompt]) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Return the texts, and for each the probability of the token that ends its last integer; NaN without one.

        ERank's score of a document is that integer times this probability. A probability is the model's own, before
        temperature and top_p; for "10" as two tokens it is that of "0" after "1".

        Source: ERank, arXiv 2509.00520.
        """
        texts: list[str] = []
        chances = np.full(len(prompts), np.nan)
        for i, (tokens, logs) in enumerate(self._answers(prompts)):
            text = self.engine.text(tokens)
            texts.append(text)
            found = list(INTEGER.finditer(text))
            if found:
                chances[i] = np.exp(logs[self._token_at(tokens, found[-1].end())])
        return texts, chances

    def _token_at(self, tokens: list[int], end: int) -> int:
        """The token whose text reaches character `end`: the first prefix of the answer that is that long."""
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            if len(self.engine.text(tokens[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        return low - 1

    def _answers(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], list[float]]]:
        rows = [np.asarray(prompt.ids).tolist() for prompt in prompts]
        room = self.engine.context
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"prompts[{i}] has no tokens")
            if room is not None and len(row) + self.max_new_tokens > room:
                raise ValueError(
                    f"prompts[{i}] has {len(row)} tokens, which with max_new_tokens={self.max_new_tokens} is more than "
                    f"the model's context of {room}: shorten the prompts (max_length) or lower max_new_tokens"
                )
        answers: list[Any] = [None] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for begin in range(0, len(rows), self.batch_size):
            chosen = by_length[begin : begin + self.batch_size]
            seeds = [_seed(self.seed, rows[i]) for i in chosen]
            batch = self.engine.generate(
                [rows[i] for i in chosen], self.max_new_tokens, self.temperature, self.top_p, seeds, self.stop, _TAIL
            )
            for i, answer in zip(chosen, batch, strict=True):
                answers[i] = answer
        return answers


def room_to_write(
    checkpoint: Checkpoint, template_limit: int | None, max_length: int | None, new_tokens: int
) -> int | None:
    """Return the limit of a prompt that leaves `new_tokens` of the model's context; ValueError where none is left."""
    room = checkpoint.config.get("max_position_embeddings")
    if not isinstance(room, int):
        return max_length
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or not 0 < new_tokens < room:
        raise ValueError(
            f"max_new_tokens must be from 1 to {room - 1}, so that the model's context of {room} tokens leaves some to "
            f"the prompt, got {new_tokens!r}"
        )
    limit = (template_limit or room) if max_length is None else max_length
    return min(limit, room - new_tokens)


def _seed(seed: int, row: list[int]) -> int:
    digest = hashlib.sha256(np.array([seed, *row], np.int64).tobytes()).digest()
    return int.from_bytes(digest[:7], "little")
