"""Tiny decoders with tokenizers, and the published two eager forwards with spans by places in the prompt's text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import decoders
import numpy as np
import prompt_tokenizers
import torch
import transformers

from fastrerank.inputs.prompts.attention_prompts import AttentionPrompts

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
# family -> tokenizer style
FAMILIES = {
    "llama": "llama3",
    "mistral": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "gemma2": "gemma",
    "phi3": "phi3",
}
WINDOW = 64  # sliding layers see some documents and not others
QUERY = "where do owls {0} sleep?"
DOCUMENTS = [
    "The owl sleeps by day, and hunts mice by night.",
    "",
    "7 mice [3] and {x} cats sleep.\n\n",
    "Café Zürich: naïve façade, 東京は大きい。",
    "The owl sleeps by day, and hunts mice by night.",
    "It is a query about passages",
]
HEADS = [(0, 1), (1, 0), (1, 3)]
Heads = Sequence[tuple[int, int]]


def save(folder: Path, family: str, **changes: object) -> Path:
    """A tiny checkpoint with a tokenizer in its family's style."""
    prompt_tokenizers.save(FAMILIES[family], folder)
    size = len(transformers.AutoTokenizer.from_pretrained(str(folder)))
    window = {"sliding_window": WINDOW} if family in ("mistral", "qwen2", "gemma2") else {}
    return decoders.save(folder, family, vocab_size=size, **(window | changes))


class Eager:
    """The published scheme: two eager forwards of the whole prompt, spans by the places of tokens in its text."""

    def __init__(self, path: Path, prompts: AttentionPrompts, heads: Heads | None) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.policy, self.layout, self.heads = prompts.policy, prompts.layout, heads
        self.instruction = prompts.instruction

    def text(self, query: str, documents: Sequence[str]) -> tuple[str, list[tuple[int, int]], int, int]:
        """The prompt, the characters of each document's span, where the instruction starts, where the query ends."""
        policy, layout = self.policy, self.layout
        text = f"{layout.prefix} Here are some paragraphs:"
        places = {}
        listed = list(enumerate(documents))
        for number, (i, document) in enumerate(listed[::-1] if policy.order == "reversed" else listed, start=1):
            text += layout.separator
            start = len(text)
            text += policy.label.replace("{number}", str(number))
            start = start if policy.label_in_span else len(text)
            text += f" {document}"
            places[i] = (start, len(text))
        text += layout.separator
        begin = len(text)
        text += f"{self.instruction}{layout.separator}Query: {query}"
        return text + layout.suffix, [places[i] for i in range(len(documents))], begin, len(text)

    def by_head(self, query: str, documents: Sequence[str], extra: int | None = None) -> list[np.ndarray]:
        """Mean over the rows of each span's tokens, by layer and head: one float64 (layers, heads, tokens) per span."""
        query = query.strip() if "strip" in self.policy.preprocess_query or self.layout.strips else query
        text, spans, begin, end = self.text(query, documents)
        encoding = self.tokenizer(
            text, return_offsets_mapping=True, return_tensors="pt", add_special_tokens=self.layout.bos
        )
        starts, ends = encoding.offset_mapping[0].T.numpy()
        real = ends > starts
        with torch.inference_mode():
            attentions = self.model(encoding.input_ids, output_attentions=True).attentions
        first = np.flatnonzero(real & (ends > begin))[0]
        behind = int(self.policy.extra_token and self.layout.extra_token)
        last = len(starts)
        if self.policy.rows == "query":
            last = min(last, np.flatnonzero(real & (starts < end))[-1] + 1 + behind)
        extra = behind if extra is None else extra
        means = torch.stack([rows[0, :, first:last].double().mean(1) for rows in attentions]).numpy()
        found = []
        for start, stop in spans:
            inside = np.flatnonzero(real & (ends > start) & (starts < stop))
            found.append(means[:, :, inside[0] : min(first, inside[-1] + 1 + extra)])
        return found

    def masses(self, query: str, documents: Sequence[str], calibrate: bool = True) -> list[np.ndarray]:
        """Masses of each span's tokens, summed over the heads that are read."""
        found = self.by_head(query, documents)
        if calibrate:
            found = [a - b for a, b in zip(found, self.by_head("N/A", documents), strict=True)]
        if self.heads is None:
            return [one.sum((0, 1)) for one in found]
        return [sum(one[layer, head] for layer, head in self.heads) for one in found]


def filtered(masses: np.ndarray) -> float:
    """The published filter and sum, in torch."""
    if len(masses) < 2:
        return 0.0
    values = torch.from_numpy(np.ascontiguousarray(masses))
    return float(values[values > values.mean() - 2 * values.std()].sum())
