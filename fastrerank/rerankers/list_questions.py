"""The base of rerankers that show several documents in a prompt: questions in batches, answered by logits or text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.inputs.prompts.template import MOST_IDENTIFIERS
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.generation import Generate, TransformersGenerator, room_to_write
from fastrerank.rerankers.llm import LLMReranker
from fastrerank.runtime.types import Readout

__all__ = ["ListReranker", "Request", "Texts"]

# Prompts that are tokenised and scored at once. This bounds memory when all pairs of many documents are compared.
BLOCK_PROMPTS = 4096
_RUNNING = {"num_threads", "memory_limit", "share_prefixes"}
_HUB = ("revision", "cache_folder", "local_files_only", "token", "trust_remote_code")

log = logging.getLogger("fastrerank")

# (number of the query, its documents in the order they are shown)
Request = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Texts:
    """What a call ranks: queries, one list of documents per query, and one note per document where they are printed."""

    queries: list[str]
    documents: list[list[str]]
    notes: list[list[str]] | None = None
    call: CallOptions = NO_OPTIONS


class ListReranker(LLMReranker):
    """Puts several documents into a prompt; reads logits of the labels, or a text that the model writes.

    Args:
        model: hub id or local folder. With `generate`, only its tokenizer and chat template are used.
        count: most documents in a prompt.
        template: name or file of a prompt template of this method's kind; None for what the checkpoint was trained
            with, where it can be recognised, else the method's own.
        readout: "logits", "generation", or None: generation if `generate` is given or the template is published with
            it, else logits.
        generate: answers prompts with texts, see `fastrerank.rerankers.generation.Generate`; None: the checkpoint
            itself does, greedily.
        max_new_tokens: most tokens of a text that the checkpoint writes; None for what the template needs.
        options: as for `LLMReranker`. Options about running weights are refused where no weights are loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        count: int,
        template: str | Path | None = None,
        readout: Readout | None = None,
        generate: Generate | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        if readout not in (None, "logits", "generation"):
            raise ValueError(f"readout must be None, 'logits' or 'generation', got {readout!r}")
        if generate is not None and not callable(generate):
            raise TypeError(f"generate must be callable (prompts in, texts out), got {type(generate).__name__}")
        if generate is not None and readout == "logits":
            raise ValueError("readout must be None or 'generation' where generate is given, got 'logits'")
        self.readout = "generation" if generate is not None else readout
        self.generate = generate
        self._count = count
        checkpoint = open_checkpoint(model, **{name: options[name] for name in _HUB if name in options})
        found = self._template(checkpoint, template)
        writes = self.readout == "generation" and generate is None
        if max_new_tokens is not None and not writes:
            raise ValueError(
                "max_new_tokens is for texts that the checkpoint writes: readout='generation', no generate"
            )
        if self.readout == "generation":
            unused = sorted(options.keys() & (_RUNNING if writes else {*_RUNNING, "device", "dtype"}))
            if unused:
                reason = "readout='generation' does not use" if writes else "generate= answers the prompts, without"
                raise ValueError(f"{reason} {', '.join(unused)}")
        if writes:
            usual = found.max_new_tokens or 8 * count + 32
            self._stop = found.stop
            self._new_tokens = usual if max_new_tokens is None else max_new_tokens
            options["max_length"] = room_to_write(
                checkpoint, found.max_length, options.get("max_length"), self._new_tokens
            )
        super().__init__(model, template=template, **options)
        if self.readout == "logits":  # labels that are no single tokens are refused now, not by the first call
            self._labels = self.prompts.label_ids(count) if self.template.identifiers else self.prompts.label_ids()

    def _template(self, checkpoint: Checkpoint, wanted: str | Path | None) -> Any:
        template = super()._template(checkpoint, wanted)
        if self.readout is None:
            self.readout = "generation" if template.readout == "generate" else "logits"
        single = MOST_IDENTIFIERS.get(template.identifiers, self._count)
        if self._count > single and (self.readout == "logits" or template.identifiers == "alphabetic"):
            only = "there are 26 letters" if single == 26 else "from 10 on, numbers are several tokens"
            raise ValueError(
                f"{self._count} documents in a prompt are more than template {template.name!r} can name for readout "
                f"{self.readout!r}, which is {single} ({only}): use windows or sets of at most {single}"
            )
        if template.most_documents is not None and self._count > template.most_documents:
            raise ValueError(
                f"template {template.name!r} shows at most {template.most_documents} documents in a prompt, got "
                f"{self._count}"
            )
        written = "generate" if self.readout == "generation" else "logits"
        return template if template.readout == written else replace(template, readout=written)

    def _scorer(self, checkpoint: Checkpoint, **options: Any) -> Any:
        if self.readout == "logits":
            return super()._scorer(checkpoint, **options)
        if self.generate is None:
            self.generate = TransformersGenerator(
                checkpoint.path,
                max_new_tokens=self._new_tokens,
                stop=self._stop,
                device=options["device"],
                dtype=options["dtype"],
                trust_remote_code=checkpoint.trust_remote_code,
            )
        return None

    def _encode(self, texts: Texts, requests: Sequence[Request], usage: Usage) -> list[Any]:
        prompts = []
        tokenizer = self.prompts.with_instruction(texts.call.instruction)
        with usage.stage("tokenize"):
            for query, some in groupby(requests, key=lambda request: request[0]):
                shown = [documents for _, documents in some]
                lists = [[texts.documents[query][i] for i in documents] for documents in shown]
                notes = None
                if texts.notes is not None:
                    notes = [[texts.notes[query][i] for i in documents] for documents in shown]
                prompts += tokenizer.encode(texts.queries[query], lists, notes=notes, limits=texts.call.limits)
        return prompts

    def _label_logits(self, texts: Texts, requests: Sequence[Request], usage: Usage) -> list[Scores]:
        """The logits of each prompt's labels (a list's identifiers, or all labels), one array per request."""
        found: list[Scores] = []
        for begin in range(0, len(requests), BLOCK_PROMPTS):
            block = requests[begin : begin + BLOCK_PROMPTS]
            widths = [len(documents) for _, documents in block]
            named = bool(self.template.identifiers)
            labels = self._labels[: max(widths)] if named else self._labels
            logits = self._logits(self._encode(texts, block, usage), labels, usage)
            if not np.isfinite(logits).all():
                query, documents = block[int(np.argwhere(~np.isfinite(logits))[0][0])]
                raise FloatingPointError(
                    f"the model's logits for documents {list(documents)} of query {query} are NaN or infinite, so they "
                    "cannot be ranked: the weights are damaged or overflow in this precision (try dtype='float32')"
                )
            found += [row[:width] if named else row for row, width in zip(logits, widths, strict=True)]
        return found

    def _written(self, texts: Texts, requests: Sequence[Request], usage: Usage) -> list[str]:
        """What the model writes in answer to each request."""
        assert self.generate is not None
        found: list[str] = []
        for begin in range(0, len(requests), BLOCK_PROMPTS):
            prompts = self._encode(texts, requests[begin : begin + BLOCK_PROMPTS], usage)
            with usage.stage("generate"):
                answers = self.generate(prompts)
            if len(answers) != len(prompts) or not all(isinstance(answer, str) for answer in answers):
                raise ValueError(f"generate must return one str per prompt: {len(prompts)}, got {len(answers)} answers")
            usage.tokens += sum(len(prompt.ids) for prompt in prompts)
            usage.truncated += sum(int(prompt.truncated.sum()) for prompt in prompts)
            found += answers
        return found

    def _report(self, usage: Usage) -> None:
        if usage.unparsed:
            log.warning(
                "%d of %d answers of template %r were incomplete or malformed; what they left out kept its order",
                usage.unparsed,
                usage.comparisons,
                self.template.name,
            )
