"""Tokenizers of the encoder families, trained on a few sentences and saved as published checkpoints save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The owl sleeps by day, and hunts mice by night.",
    "Rerankers read the query and a passage together.",
    "Café Zürich: naïve façade, 東京 is a big city; Москва тоже.",
    "What is 3.14159 times two? About 6.28318!",
    "  leading   and trailing   spaces\tand\nnew lines  ",
]
QUERY = "where do owls sleep?"
DOCUMENTS = [
    *CORPUS,
    "",
    "   ",
    "東京",
    "a\u0000b",
    "שלום עולם",
    "🦉👩‍👩‍👧 ok",
    "[SEP] </s> <s> [CLS] [MASK] <mask>",
    "x" * 300,
]
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_bert(folder: Path, tokenizer_class: str = "BertTokenizer", lowercase: bool = True) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=BERT_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {f"{token[1:-1].lower()}_token": token for token in BERT_TOKENS}
    save(folder, tokenizer, tokenizer_class, "bert", do_lower_case=lowercase, **named)


def train_roberta(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=ROBERTA_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    save(folder, tokenizer, "RobertaTokenizer", "roberta", add_prefix_space=False)


def train_xlm_roberta(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=ROBERTA_TOKENS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    # The generic class: the XLM-R class of transformers would put its own normalizer in the place of NFKC.
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    save(folder, tokenizer, "PreTrainedTokenizerFast", "xlm-roberta", **names)


def train_modernbert(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=BERT_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("[MASK]", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    save(folder, tokenizer, "PreTrainedTokenizerFast", "modernbert", **names)


def train_bare(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    save(folder, tokenizer, "PreTrainedTokenizerFast", "bert", unk_token="<unk>")


def save(folder: Path, tokenizer: tokenizers.Tokenizer, tokenizer_class: str, model_type: str, **options: Any) -> None:
    # As published: with a length and padding left switched on in the file.
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "model_max_length": 512} | options)
    write(folder / "config.json", {"model_type": model_type, "max_position_embeddings": 514, "pad_token_id": 1})


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


FAMILIES: dict[str, Callable[[Path], None]] = {
    "bert": train_bert,
    "distilbert": lambda folder: train_bert(folder, "DistilBertTokenizer"),
    "bert-cased": lambda folder: train_bert(folder, lowercase=False),
    "roberta": train_roberta,
    "xlm-roberta": train_xlm_roberta,
    "modernbert": train_modernbert,
    "no post-processor": train_bare,
}
