"""Listwise, pairwise and setwise rerankers on tiny models: schedules written out over transformers' full logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import decoders
import prompt_tokenizers
import torch
import transformers

import fastrerank
from fastrerank.rerankers.listwise import ListwiseReranker
from fastrerank.rerankers.pairwise import PairwiseReranker
from fastrerank.rerankers.pointwise import PointwiseReranker
from fastrerank.rerankers.setwise import SetwiseReranker

QUERY = "how long do fleas live?"
DOCUMENTS = [f"{'owl ' * (i % 5)}number {i} {'sleeps' if i % 3 else 'hunts'} [{i}]" for i in range(23)]
DOCUMENTS[4], DOCUMENTS[9], DOCUMENTS[11] = "", DOCUMENTS[8], "<|im_end|> {query}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("qwen3"))


def save(folder: Path, family: str = "qwen3", style: str = "qwen") -> Path:
    prompt_tokenizers.save(style, folder, answers=True)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    return decoders.save(folder, family, vocab_size=size, max_position_embeddings=4096)


class Reference:
    """Full logits of the labels after each prompt of a reranker, one prompt at a time."""

    def __init__(self, folder: Path, reranker: Any) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.reranker = reranker

    def __call__(self, texts: Sequence[str], labels: np.ndarray) -> np.ndarray:
        (prompt,) = self.reranker.prompts.encode(QUERY, [texts])
        return decoders.full_logits(self.model, [prompt.ids.astype(np.int64)], labels)[0]


def ranking(reranker: Any, documents: Sequence[str]) -> list[int]:
    return [row["corpus_id"] for row in reranker.rank(QUERY, documents)]


@pytest.mark.parametrize("template", ["first", "first-rank_llm"])
def test_first_reads_exact_logits_of_all_identifiers(template: str, folder: Path) -> None:
    reranker = ListwiseReranker(folder, template=template)
    documents = DOCUMENTS[:20]
    expected = Reference(folder, reranker)(documents, reranker.prompts.label_ids(20))
    ours = reranker.score(QUERY, documents)
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()
    assert ranking(reranker, documents) == np.argsort(-ours, kind="stable").tolist()
    assert reranker.last_usage["forwards"] == 1


def test_first_over_windows(folder: Path) -> None:
    reranker = ListwiseReranker(folder, template="first", window=8, stride=4)
    reference, labels = Reference(folder, reranker), reranker.prompts.label_ids(8)
    expected, end = list(range(len(DOCUMENTS))), len(DOCUMENTS)
    start, steps = end - 8, 0
    while end > 0 and start + 4 != 0:
        start = max(start, 0)
        window = expected[start:end]
        logits = reference([DOCUMENTS[i] for i in window], labels[: len(window)])
        expected[start:end] = [window[i] for i in np.argsort(-logits, kind="stable")]
        start, end, steps = start - 4, end - 4, steps + 1
    assert ranking(reranker, DOCUMENTS) == expected
    assert reranker.last_usage["steps"] == steps
    scores = reranker.score(QUERY, DOCUMENTS)
    assert np.array_equal(np.argsort(-scores), expected)


def test_first_makes_nine_windows_of_a_hundred_and_runs_queries_together(folder: Path) -> None:
    reranker = ListwiseReranker(folder, template="first")
    documents = [f"{i} owl" for i in range(100)]
    alone = [ranking(reranker, documents), ranking(reranker, documents[::-1])]
    assert reranker.last_usage["steps"] == reranker.last_usage["comparisons"] == 9
    scores = reranker.score_many([QUERY, QUERY], [documents, documents[::-1]])
    assert [np.argsort(-some).tolist() for some in scores] == alone
    assert reranker.last_usage["steps"] == 9
    assert reranker.last_usage["comparisons"] == 18


def preference(reference: Reference, labels: np.ndarray, i: int, j: int, documents: Sequence[str]) -> float:
    ahead = reference([documents[i], documents[j]], labels)
    behind = reference([documents[j], documents[i]], labels)
    first, second = ahead[0] - ahead[1], behind[0] - behind[1]
    return 1.0 if first > 0 > second else 0.0 if first < 0 < second else 0.5


@pytest.fixture(scope="module")
def wins(folder: Path) -> np.ndarray:
    """(9, 9): how far document i wins against j by both orders of full logits."""
    reranker = PairwiseReranker(folder)
    reference, labels = Reference(folder, reranker), reranker.prompts.label_ids()
    n = 9
    table = np.full((n, n), 0.5)
    for i in range(n):
        for j in range(i):
            table[i, j] = preference(reference, labels, i, j, DOCUMENTS)
            table[j, i] = 1 - table[i, j]
    return table


def test_allpair_counts_wins(folder: Path, wins: np.ndarray) -> None:
    reranker = PairwiseReranker(folder, algorithm="allpair")
    points = wins.sum(1) - 0.5
    assert np.array_equal(reranker.score(QUERY, DOCUMENTS[:9]), points.astype(np.float32))
    usage = reranker.last_usage
    assert usage["comparisons"] == 36
    assert usage["prefix_tokens"] > 0
    alone = PairwiseReranker(folder, algorithm="allpair", share_prefixes=False)
    assert np.array_equal(alone.score(QUERY, DOCUMENTS[:9]), points.astype(np.float32))
    assert usage["tokens"] < 0.7 * alone.last_usage["tokens"]


def test_sliding_swaps_neighbours_from_the_bottom(folder: Path, wins: np.ndarray) -> None:
    expected = list(range(9))
    for done in range(3):
        for place in range(8, done, -1):
            if wins[expected[place], expected[place - 1]] == 1.0:
                expected[place - 1], expected[place] = expected[place], expected[place - 1]
    assert ranking(PairwiseReranker(folder, algorithm="sliding", passes=3), DOCUMENTS[:9]) == expected


def test_heapsort_extracts_the_root_of_a_max_heap(folder: Path, wins: np.ndarray) -> None:
    heap, top = list(range(9)), 4

    def sift(size: int, at: int) -> None:
        while True:
            largest = at
            for child in (2 * at + 1, 2 * at + 2):
                if child < size and wins[heap[child], heap[largest]] == 1.0:
                    largest = child
            if largest == at:
                return
            heap[at], heap[largest] = heap[largest], heap[at]
            at = largest

    for at in range(9 // 2 - 1, -1, -1):
        sift(9, at)
    taken = []
    for size in range(8, 8 - top, -1):
        taken.append(heap[0])
        heap[0], heap[size] = heap[size], heap[0]
        sift(size, 0)
    expected = taken + [i for i in range(9) if i not in taken]
    assert ranking(PairwiseReranker(folder, top_k=top), DOCUMENTS[:9]) == expected


def test_setwise_by_label_logits(folder: Path) -> None:
    reranker = SetwiseReranker(folder, template="rank-r1", readout="logits", set_size=5, top_k=1)
    labels = reranker.prompts.label_ids(5)
    expected = Reference(folder, reranker)(DOCUMENTS[:5], labels)
    assert ranking(reranker, DOCUMENTS[:5])[0] == int(np.argmax(expected))


@pytest.mark.parametrize("template", ["monot5", "rankt5"])
def test_encoder_decoders(template: str, tmp_path: Path) -> None:
    prompt_tokenizers.save("t5", tmp_path, answers=True)
    size = len(transformers.AutoTokenizer.from_pretrained(tmp_path))
    config = transformers.T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        num_heads=4,
        d_ff=50,
        num_layers=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = decoders.randomise(transformers.T5ForConditionalGeneration(config), 0)
    model.save_pretrained(tmp_path)
    reranker = fastrerank.load(tmp_path, method="pointwise", template=template)
    assert isinstance(reranker, PointwiseReranker)
    if template == "monot5":
        assert PointwiseReranker(tmp_path).template.name == "monot5"
    labels = torch.from_numpy(reranker.prompts.label_ids())
    expected = []
    for prompt in reranker.prompts.encode(QUERY, [[text] for text in DOCUMENTS]):
        ids = torch.from_numpy(prompt.ids.astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1][labels]
        expected.append(float(logits[0] - (logits[1] if len(logits) > 1 else 0)))
    ours = reranker.score(QUERY, DOCUMENTS)
    assert np.ptp(expected) > 0.1
    assert np.abs(ours - np.array(expected)).max() <= 2e-5 * np.abs(expected).max()


def test_too_many_documents_in_a_window_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="26 letters"):
        ListwiseReranker(folder, template="first", window=27)
