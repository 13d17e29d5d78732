"""A fake model for rerankers of lists: it sees only the prompts, and answers by what the documents in them say.

Documents are texts such as "cat 7"; the number is how relevant the fake finds it for every query. What it says depends
on the prompt alone: `Model.noise` adds a draw that depends on all of the prompt, so that comparisons contradict
each other as a real model's do.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.usage import Cost
from fastrerank.inputs.limits import NO_LIMITS, TextLimits
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.llm import LLMReranker

# Ids of this many identifiers or labels start here.
LABELS = 1_000_000


@dataclass(frozen=True)
class Template:
    name: str
    kind: str
    labels: tuple[str, ...] = ()
    identifiers: str = ""
    readout: str = "logits"
    most_documents: int | None = None
    uses_notes: bool = False
    uses_instruction: bool = False
    max_length: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    algorithm: str = ""


TEMPLATES = {
    template.name: template
    for template in (
        Template("first", "listwise", identifiers="alphabetic"),
        Template("rankgpt", "listwise", identifiers="numeric", readout="generate"),
        Template(
            "reasonrank",
            "listwise",
            identifiers="numeric",
            readout="generate",
            max_new_tokens=3172,
            stop=("</answer>",),
        ),
        Template("insertrank", "listwise", identifiers="numeric", readout="generate", uses_notes=True),
        Template("grouprank", "listwise", identifiers="numeric", readout="generate", algorithm="groups"),
        Template("prp", "pairwise", labels=("A", "B")),
        Template("setwise", "setwise", identifiers="alphabetic", most_documents=23),
        Template("rank-r1", "setwise", identifiers="numeric", readout="generate"),
    )
}


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    truncated: np.ndarray
    documents: tuple[str, ...]
    notes: tuple[str, ...] | None
    query: str

    @property
    def messages(self) -> list[dict[str, str]]:
        lines = [f"[{i}] {text}" for i, text in enumerate(self.documents, start=1)]
        return [{"role": "user", "content": "\n".join([self.query, *lines])}]


class Prompts:
    """One id per text; texts over 100 characters count as cut."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.texts: list[str] = []

    def encode(
        self,
        query: str,
        lists: Sequence[Sequence[str]],
        *,
        notes: Sequence[Sequence[str]] | None = None,
        limits: TextLimits = NO_LIMITS,
    ) -> list[Prompt]:
        assert limits == NO_LIMITS
        assert self.template.uses_notes == (notes is not None)
        prompts = []
        for i, documents in enumerate(lists):
            ids = [self._id(query), *map(self._id, documents)]
            cut = np.array([len(text) > 100 for text in documents], bool)
            printed = None if notes is None else tuple(notes[i])
            prompts.append(Prompt(np.array(ids, np.int32), cut, tuple(documents), printed, query))
        return prompts

    def with_instruction(self, instruction: str | None) -> Prompts:
        assert instruction is None
        return self

    def label_ids(self, count: int | None = None) -> np.ndarray:
        assert (count is None) == bool(self.template.labels)
        return np.arange(LABELS, LABELS + (len(self.template.labels) if count is None else count))

    def _id(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)


def relevance(text: str) -> float:
    found = re.search(r"-?\d+", text)
    return float(found.group()) if found else 0.0


@dataclass
class Model:
    """Scorer and writer; counts what it is asked."""

    prompts: Prompts
    noise: float = 0.0
    calls: list[int] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    max_length: int | None = None

    def label_logits(self, prompts: Sequence[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, Cost]:
        assert labels.tolist() == list(range(LABELS, LABELS + len(labels)))
        self.calls.append(len(prompts))
        self.seen += [ids.tolist() for ids in prompts]
        logits = np.full((len(prompts), len(labels)), -1e9, np.float32)  # letters that name no document
        for i, ids in enumerate(prompts):
            values = self._values([self.prompts.texts[j] for j in ids])
            logits[i, : len(values)] = values[: len(labels)]
        return logits, Cost(1, sum(map(len, prompts)), 0)

    def _values(self, texts: list[str]) -> list[float]:
        drawn = random.Random("\n".join(texts).encode("utf-8", "surrogatepass"))
        return [relevance(text) + self.noise * drawn.gauss(0, 1) for text in texts[1:]]

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        self.calls.append(len(prompts))
        self.seen += prompts
        return [self._text(prompt) for prompt in prompts]

    def _text(self, prompt: Prompt) -> str:
        values = self._values([prompt.query, *prompt.documents])
        order = sorted(range(len(values)), key=lambda i: -values[i])
        name = self.prompts.template.name
        if name == "grouprank":
            scores = {f"[{i + 1}]": max(0, min(10, round(value))) for i, value in enumerate(values)}
            return f"<answer>```json\n{json.dumps(scores)}\n```"
        if name == "rank-r1":
            return f"<think>[1] is good.</think> <answer>[{order[0] + 1}]</answer>"
        if self.prompts.template.identifiers == "alphabetic":
            return " > ".join(f"[{chr(65 + i)}]" for i in order)
        ranking = " > ".join(f"[{i + 1}]" for i in order)
        return f"<think>[1] or [2]?</think><answer>{ranking}</answer>" if name == "reasonrank" else ranking


Build = Callable[..., Any]


def builder(patch: pytest.MonkeyPatch, folder: Path) -> Build:
    """`build(Class, noise=, **options)` -> the reranker, whose `.model` is a fake; nothing else of it is replaced."""
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
    built: dict[str, Any] = {}

    def initialise(self: Any, model: Any, *, template: Any = None, max_length: int | None = None) -> None:
        Reranker.__init__(self)
        checkpoint = open_checkpoint(model)
        self.template = self._template(checkpoint, template)
        self.prompts = Prompts(self.template)
        self.model = Model(self.prompts, built.get("noise", 0.0))
        self.max_length = max_length
        self.scorer = self._scorer(checkpoint, device="cpu", dtype="float32")

    def template_of(self: Any, _: Any, wanted: Any) -> Template:
        template = TEMPLATES[wanted or self.default_template]
        if template.kind != self.kind:
            raise ValueError(f"template {template.name!r} is {template.kind}")
        return template

    patch.setattr(LLMReranker, "__init__", initialise)
    patch.setattr(LLMReranker, "_template", template_of)
    patch.setattr(LLMReranker, "_scorer", lambda self, _, **__: self.model)

    def build(kind: type, *, noise: float = 0.0, write: bool = False, **options: Any) -> Any:
        built["noise"] = noise
        if write:
            options["generate"] = lambda prompts: made.model.write(prompts)
        made = kind(folder, **options)
        return made

    return build


def documents(n: int, seed: int = 0) -> list[str]:
    """n texts whose numbers are 0..n-1 shuffled."""
    numbers = list(range(n))
    random.Random(seed).shuffle(numbers)
    return [f"text {number}" for number in numbers]


def by_relevance(texts: Sequence[str]) -> list[int]:
    return sorted(range(len(texts)), key=lambda i: (-relevance(texts[i]), i))


def order_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["corpus_id"] for row in rows]
