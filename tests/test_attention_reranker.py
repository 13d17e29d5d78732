"""AttentionReranker against two eager forwards of transformers: masses, scores and rankings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import prompt_tokenizers
import pytest
import torch
import transformers

from fastrerank.rerankers.attention import AttentionReranker
from fastrerank.text.attention_policy import Policy

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
# family -> tokenizer style
FAMILIES = {
    "llama": "llama3", "mistral": "mistral", "qwen2": "qwen", "qwen3": "qwen", "gemma2": "gemma", "phi3": "phi3",
}  # fmt: skip
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint of a family with a tokenizer in its style; the trained one for "stories"."""
    made: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family == "stories":
            if not STORIES.is_dir():
                pytest.skip("shared/models/stories260K is not here")
            return STORIES
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            prompt_tokenizers.save(FAMILIES[family], path)
            size = len(transformers.AutoTokenizer.from_pretrained(str(path)))
            window = {"sliding_window": WINDOW} if family in ("mistral", "qwen2", "gemma2") else {}
            made[family] = decoders.save(path, family, vocab_size=size, **window)
        return made[family]

    return checkpoint


class Eager:
    """The published scheme: two eager forwards of the whole prompt, spans by the places of tokens in its text."""

    def __init__(self, path: Path, reranker: AttentionReranker, heads: list[tuple[int, int]] | None) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.policy, self.layout, self.heads = reranker.policy, reranker.prompts.layout, heads
        self.instruction = reranker.prompts.instruction

    def text(self, query: str, documents: list[str]) -> tuple[str, list[tuple[int, int]], int, int]:
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

    def pass_(self, query: str, documents: list[str]) -> list[np.ndarray]:
        """Mean over the rows, summed over heads, of each span's tokens."""
        text, spans, begin, end = self.text(query, documents)
        encoding = self.tokenizer(
            text, return_offsets_mapping=True, return_tensors="pt", add_special_tokens=self.layout.bos
        )
        starts, ends = encoding.offset_mapping[0].T.numpy()
        real = ends > starts
        with torch.inference_mode():
            attentions = self.model(encoding.input_ids, output_attentions=True).attentions
        first = np.flatnonzero(real & (ends > begin))[0]
        extra = int(self.policy.extra_token and self.layout.extra_token)
        last = len(starts)
        if self.policy.rows == "query":
            last = min(last, np.flatnonzero(real & (starts < end))[-1] + 1 + extra)
        total = np.zeros(len(starts))
        for layer, rows in enumerate(attentions):
            for head in range(rows.shape[1]):
                if self.heads is None or (layer, head) in self.heads:
                    total += rows[0, head, first:last].double().mean(0).numpy()
        found = []
        for start, stop in spans:
            inside = np.flatnonzero(real & (ends > start) & (starts < stop))
            found.append(total[inside[0] : min(first, inside[-1] + 1 + extra)])
        return found

    def masses(self, query: str, documents: list[str], calibrate: bool = True) -> list[np.ndarray]:
        query = query.strip() if self.policy.strip_query or self.layout.strips else query
        found = self.pass_(query, documents)
        if not calibrate:
            return found
        return [a - b for a, b in zip(found, self.pass_("N/A", documents), strict=True)]


def scores_of(masses: list[np.ndarray]) -> np.ndarray:
    kept = []
    for one in masses:
        values = torch.from_numpy(one)
        kept.append(float(values[values > values.mean() - 2 * values.std()].sum()))
    return np.array(kept)


def check(reranker: AttentionReranker, eager: Eager, documents: list[str], calibrate: bool = True) -> None:
    ours, expected = reranker.token_masses(QUERY, documents), eager.masses(QUERY, documents, calibrate)
    assert [len(one) for one in ours] == [len(one) for one in expected]
    largest = max(float(np.abs(one).max(initial=0)) for one in expected)
    assert largest > 0
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    scores, wanted = reranker.score(QUERY, documents), scores_of(expected)
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    ranking = [hit["corpus_id"] for hit in reranker.rank(QUERY, documents)]
    assert (np.diff(wanted[ranking]) <= 2e-5).all()


@pytest.mark.parametrize("preset", ["icr", "qrhead", "core"])
@pytest.mark.parametrize("family", [*FAMILIES, "stories"])
def test_equals_two_eager_forwards(folder: Any, family: str, preset: str) -> None:
    heads = None if preset == "icr" else HEADS
    path = folder(family)
    reranker = AttentionReranker(path, preset=preset, heads=heads, dtype="float32")
    check(reranker, Eager(path, reranker, heads), DOCUMENTS[: 3 if family == "stories" else None])
    assert reranker.policy == Policy.load(preset)
