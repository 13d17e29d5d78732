"""Tokenizers of every kind, hostile texts, and a process of its own that tokenises very long ones."""

from __future__ import annotations

import json
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Query: where do owls sleep? Document: The owl sleeps by day, and hunts mice by night. it's they're don't",
    "Café Zürich: naïve façade, 東京は大きい。 Москва тоже. What is 3.14159 times 2? About 6.28318!",
    "!!!!!!!! ---- ==== ....... a!!!b ??!!??!!",
    "        x    y\n\n\n\n   \n  z\t\t",
    "aaaaaaa abababab bananana",
    "123456789 2024 1000000",
    "東京東京大大大国国国 東京は",
    "e\u0301e\u0301 ﬁﬂ½ ＡＢＣ カ゛",
]
ATOMS = [
    "!",
    "?!",
    "-",
    "  ",
    " ",
    "\n",
    " \n",
    "\t",
    "a",
    "A",
    "aB",
    "ab",
    "banana",
    "1",
    "123",
    "東",
    "京",
    "東京国",
    "。",
    "é",
    "e\u0301",
    "\u0301",
    "カ゛",
    "ｶﾞ",
    "👩‍👩‍👧",
    "🦉",
    "🇫🇷",
    "\u0000",
    "\u200d",
    "\u00a0",
    "ﬁ",
    "½",
    "Ａ",
    "</s>",
    "<|end|>",
    "[SEP]",
    "'s",
    "x" * 150,
    "ا",
    "ไทย",
    "क्षि",
    "\u3000",
    "_",
    ".",
    "The owl sleeps, ",
    "\ud83d",
    "한국",
    "\u1100\u1161\u11a8",
    "İ",
    "ß",
    "Σ",
]


def byte_level(split: str | None, normalizer: Any = None, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(["<|end|>", "</s>"])
    return tokenizer


def roberta() -> Tokenizer:
    """With a space before the text, and spans trimmed, as published."""
    tokenizer = byte_level(None, prefix=True)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.RobertaProcessing(end, end)
    return tokenizer


def bert(lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram(words: bool = False, strip: bool = False, scheme: str = "always") -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    steps = [normalizers.NFKC(), *([normalizers.Strip(left=False, right=True)] if strip else [])]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space]) if words else space
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama2() -> Tokenizer:
    """Sentencepiece's BPE: spaces are ▁, nothing splits words, bytes as the last resort."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    trained.train_from_iterator(CORPUS * 3, trainer)
    data = json.loads(trained.to_str())
    data["model"] |= {"byte_fallback": True, "fuse_unk": True}
    data["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bert": bert,
    "bert-cased": lambda: bert(False),
    "roberta": roberta,
    "gpt2": lambda: byte_level(None),
    "qwen": lambda: byte_level(QWEN_SPLIT, normalizers.NFC()),
    "llama3": lambda: byte_level(LLAMA3_SPLIT),
    "o200k": lambda: byte_level(O200K_SPLIT),
    "llama2": llama2,
    "xlm-roberta": unigram,
    "xlm-roberta-words": lambda: unigram(words=True),
    "t5": lambda: unigram(strip=True, scheme="first"),
}


def make(seed: int, size: int) -> str:
    """A text of about `size` characters: long runs of one thing, and mixtures."""
    choose = random.Random(seed)
    if choose.random() < 0.2:
        return choose.choice(ATOMS) * size + " The owl."
    parts: list[str] = []
    count = 0
    while count < size:
        if choose.random() < 0.6:
            parts.append(choose.choice(ATOMS) * int(2 ** choose.uniform(0, 11)))
        else:
            parts.append("".join(choose.choices(ATOMS, k=choose.randrange(1, 60))))
        count += len(parts[-1])
    return "".join(parts)


HOSTILE: dict[str, tuple[str, int]] = {
    "punctuation": ("!", 31_000_000),
    "mixed punctuation": ("!?.,;:", 31_000_000),
    "spaces": (" ", 31_000_000),
    "CJK": ("東京国大", 10_800_000),
    "word": ("ab", 31_000_000),
    "digits": ("1234567890", 31_000_000),
    "controls": ("\0", 31_000_000),
    "emoji": ("🦉", 7_000_000),
    "combining": ("a\u0301\u0301", 15_000_000),
}


def main(folder: Path) -> None:
    """Put hostile texts through a checkpoint as documents and as the query; print characters, tokens and memory."""
    import fastrerank.inputs.backend as backend
    import fastrerank.inputs.tokenizer as module
    from fastrerank.inputs import Tokenizer as Ours

    given = 0
    plain = backend.encode_batch

    def counting(tokenizer: Any, texts: Any, **options: Any) -> Any:
        nonlocal given
        given += sum(map(len, texts))
        return plain(tokenizer, texts, **options)

    backend.encode_batch = module.encode_batch = counting  # type: ignore[assignment]
    ours = Ours.load(folder, 128)
    ours.pairs("who?", ["the owl"])
    for name, (atom, size) in HOSTILE.items():
        text = atom * (size // len(atom)) + "x"
        base, given = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
        batch = ours.pairs("who?", [text, "the owl"])
        asked = ours.pairs(text, ["the owl"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {
            "text": name,
            "given": given,
            "tokens": [len(batch.ids), len(asked.ids)],
            "truncated": [bool(batch.truncated[0]), bool(batch.truncated[1]), asked.query_truncated],
            "grown_mb": (peak - base) / 1024,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
