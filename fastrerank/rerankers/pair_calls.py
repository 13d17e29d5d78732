"""What one call asks of a cross-encoder: the label that ranks, a prompt or an instruction, limits of the texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.inputs.limits import NO_LIMITS, TextLimits
from fastrerank.inputs.tokenizer import TokenBatch, Tokenizer
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.call import LIMITS, CallOptions
from fastrerank.rerankers.compat import Config, fitting_length, processing_options
from fastrerank.rerankers.labels import resolve_label
from fastrerank.rerankers.refusal import OptionRefused

if TYPE_CHECKING:
    from fastrerank.inputs.prompts.chat_pairs import ChatPairs

__all__ = ["PairCalls"]


class PairCalls(Reranker):
    """The part of `CrossEncoder` that checks the arguments of a call and chooses how its pairs become tokens."""

    checkpoint: Checkpoint
    config: Config
    num_labels: int
    label: int | None
    prompts: dict[str, str]
    default_prompt_name: str | None
    _chat: ChatPairs | None
    _tokenizer: Tokenizer
    _saved_text: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """Names of the head's labels in their order, those of config.json's id2label."""
        return [self.config.id2label[number] for number in range(self.num_labels)]

    @property
    def honoured_options(self) -> frozenset[str]:
        """`call_options`, without `instruction` where no chat template renders the pairs."""
        return self.call_options - (frozenset() if self._chat is not None else {"instruction"})

    def check_options(self, **options: Any) -> CallOptions:
        """Return the options of a call, checked as `score` checks them; see `Reranker.check_options`.

        Raises ValueError also for a label that the head lacks, for a missing label where several have names that say
        nothing, and for an instruction where no chat template renders the pairs.
        """
        self._check_instruction(options.get("instruction"))
        call = super().check_options(**options)
        self._column(call.label)
        return call

    def _processing(self, options: dict[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
        """Take a call's own options and the arguments of its chat template out of `options`."""
        own = {name: options.pop(name) for name in ("instruction", *LIMITS - {"max_length"}) if name in options}
        limit, chat_options = processing_options(options)
        self._check_instruction(own.get("instruction"))
        return CallOptions.of({**own, "max_length": limit}, self.honoured_options, self.method), chat_options

    def _check_instruction(self, instruction: Any) -> None:
        if isinstance(instruction, str) and "instruction" not in self.honoured_options:
            raise OptionRefused(
                "instruction",
                "instruction is for checkpoints whose chat template renders the pairs, with a place for one; this "
                "one's tokenizer joins them",
                "prompt= puts a text before the query",
            )

    def _column(self, label: str | int | None) -> int:
        """The number of the label that ranks."""
        if self.num_labels == 1 and label is None:
            return 0
        if label is not None:
            return resolve_label(label, self.labels)
        if self.label is None:
            raise OptionRefused(
                "label",
                f"one label of the {self.num_labels} has to be the one that ranks, and their names do not tell which "
                f"({', '.join(map(repr, self.labels))})",
                "label= takes a name or a number; predict() returns all",
            )
        return self.label

    def _pair_list(
        self, prompt: str, limits: TextLimits = NO_LIMITS, chat_options: dict[str, Any] | None = None
    ) -> Callable[[list[tuple[str, str]]], TokenBatch]:
        """Return what packs pairs. A chat template takes the prompt as a turn, else queries begin with it."""
        limit = self._saved_text.get("max_length") if limits.max_length is None else limits.max_length
        if limit is None:
            limit = self._tokenizer.max_length
        else:
            limit = self._tokenizer.checked_max_length(fitting_length(limit, self.checkpoint.config))
        if self._chat is None and chat_options:
            warnings.warn(
                "processing_kwargs['chat_template'] has no effect: no chat template renders this checkpoint's pairs",
                UserWarning,
                stacklevel=3,
            )
        if self._chat is not None:
            return partial(
                self._chat.pair_list, max_length=limit, prompt=prompt, chat_options=chat_options, limits=limits
            )
        if not prompt:
            return partial(self._tokenizer.pair_list, max_length=limit, limits=limits)
        return lambda pairs: self._tokenizer.pair_list([(prompt + query, text) for query, text in pairs], limit, limits)

    def _prompted(self, prompt: str, systems: list[str] | None, count: int) -> dict[str, Any]:
        """Prompt -> positions of its pairs: one prompt for all, or each pair's system message."""
        if systems is None:
            return {prompt: slice(count)}
        if self._chat is None:
            raise ValueError(
                "messages are for checkpoints whose chat template renders the pairs; this one's tokenizer joins them: "
                "give (query, document) pairs of str, or chat_template= when you load it"
            )
        if prompt and any(systems):
            raise ValueError("prompt and a system message say the same: give one of them")
        groups: dict[str, Any] = {}
        for i, system in enumerate(systems):
            groups.setdefault(system or prompt, []).append(i)
        return groups

    def _prompt(self, prompt: str | None, name: str | None, call: CallOptions) -> str:
        if call.instruction is not None:
            if prompt is not None or name is not None:
                raise ValueError("instruction and prompt say the same: give one of them")
            return call.instruction
        if prompt is not None:
            return prompt
        name = name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name must be one of {list(self.prompts)}, got {name!r}")
        return self.prompts[name]
