"""The words that T5 rerankers answer with: each published checkpoint's own, found by its name."""

from __future__ import annotations

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
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.inputs.prompts import Template
from fastrerank.rerankers.pointwise import PointwiseReranker
from fastrerank.rerankers.recognise import method_of, published_checkpoints, recognised_template

QUERY, DOCUMENTS = "how long do fleas live?", ["A flea lives up to a year.", "Cats sleep all day.", ""]
WORDS = ("true", "false", "yes", "no", "sim", "não", "Sim", "Não")
# pygaggle's table, and of the last ones that of the rerankers package: (name, piece of relevant, piece of the other).
PUBLISHED = [
    *(
        (f"castorini/monot5-{name}", "▁true", "▁false")
        for name in (
            "base-msmarco",
            "base-msmarco-10k",
            "large-msmarco",
            "large-msmarco-10k",
            "base-med-msmarco",
            "3b-med-msmarco",
            "3b-msmarco-10k",
        )
    ),
    *(
        (f"unicamp-dl/mt5-base-{name}", "▁yes", "▁no")
        for name in (
            "en-msmarco",
            "en-pt-msmarco-v1",
            "en-pt-msmarco-v2",
            "mmarco-v1",
            "mmarco-v2",
        )
    ),
    *(
        (f"unicamp-dl/ptt5-base-{name}", "▁sim", "▁não")
        for name in (
            "pt-msmarco-10k-v1",
            "pt-msmarco-10k-v2",
            "pt-msmarco-100k-v1",
            "pt-msmarco-100k-v2",
            "en-pt-msmarco-10k-v1",
            "en-pt-msmarco-100k-v2",
        )
    ),
    ("unicamp-dl/mt5-3B-mmarco-en-pt", "▁true", "▁"),
    ("unicamp-dl/mt5-13b-mmarco-100k", "▁true", "▁"),
    *((f"unicamp-dl/monoptt5-{size}", "▁Sim", "▁Não") for size in ("small", "base", "large", "3b")),
    *((f"unicamp-dl/InRanker-{size}", "▁true", "▁false") for size in ("small", "base", "3B")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mT5 whose vocabulary has all words, with and without the blank before them."""
    folder = tmp_path_factory.mktemp("mt5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_tokenizers, "T5_WORDS", WORDS)
        prompt_tokenizers.save("t5", folder)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    config = transformers.MT5Config(
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
    decoders.randomise(transformers.MT5ForConditionalGeneration(config), 0).save_pretrained(folder)
    return folder


def named(folder: Path, tmp_path: Path, name: str) -> Path:
    """The checkpoint under a published name."""
    path = tmp_path / name.split("/")[-1]
    path.symlink_to(folder)
    return path


@pytest.mark.parametrize(("name", "positive", "negative"), PUBLISHED)
def test_each_published_checkpoint_has_its_words(
    folder: Path, tmp_path: Path, name: str, positive: str, negative: str
) -> None:
    checkpoint = open_checkpoint(named(folder, tmp_path, name))
    template = Template.load(recognised_template(checkpoint, "pointwise") or "")
    pieces = tuple(label if label.startswith("▁") else f"▁{label}" for label in template.labels)
    assert pieces == (positive, negative)
    assert method_of(checkpoint) == "pointwise"
    assert template.score == "difference"
    assert template.model == "seq2seq"


@pytest.mark.parametrize(("name", "positive", "negative"), [PUBLISHED[11], PUBLISHED[12], PUBLISHED[18], PUBLISHED[20]])
def test_scores_are_differences_of_these_words_logits(
    folder: Path, tmp_path: Path, name: str, positive: str, negative: str
) -> None:
    reranker: Any = fastrerank.load(str(named(folder, tmp_path, name)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([positive, negative])
    assert reranker.prompts.label_ids().tolist() == ids
    model = transformers.MT5ForConditionalGeneration.from_pretrained(folder).eval()
    form = (
        "Pergunta: {} Documento: {} Relevante:"
        if "ptt5" in name and "mono" in name
        else ("Query: {} Document: {} Relevant:")
    )
    expected = []
    for text in DOCUMENTS:
        inputs = tokenizer(form.format(QUERY, text), return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1]
        expected.append(float(logits[ids[0]] - logits[ids[1]]))
    assert np.ptp(expected) > 0.01
    assert np.abs(reranker.score(QUERY, DOCUMENTS) - np.array(expected)).max() <= 2e-5 * np.abs(expected).max()


def test_an_unknown_multilingual_t5_asks_for_its_words(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"say template=, one of .*monot5, .*monot5-yes"):
        PointwiseReranker(folder)
    assert PointwiseReranker(folder, template="monot5-yes").template.labels == ("▁yes", "▁no")
    assert PointwiseReranker(folder, template="monot5").template.labels == ("true", "false")


def test_words_that_the_vocabulary_lacks_are_refused(tmp_path: Path) -> None:
    prompt_tokenizers.save("t5", tmp_path)
    config = transformers.MT5Config(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(tmp_path)),
        d_model=32,
        d_kv=8,
        num_heads=4,
        d_ff=50,
        num_layers=1,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    transformers.MT5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'▁sim' of template 'monot5-sim' is no piece of this tokenizer's vocabulary"):
        PointwiseReranker(tmp_path, template="monot5-sim")


def test_a_checkpoint_is_listed_once() -> None:
    listed = [name for one in published_checkpoints() for name in one.names]
    assert len(listed) == len(set(listed)) == 20
    assert all(name == name.lower() and "/" not in name for name in listed)
