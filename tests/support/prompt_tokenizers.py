"""Fast tokenizers of the styles that LLM checkpoints have, trained on a few sentences, with their chat templates."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "I will provide you with 20 passages, each indicated by an alphabetical identifier []. Rank the passages.",
    "Search Query: what is a owl?\nRank the 20 passages above based on their relevance to the search query: who.",
    'Given a query "x", which of the following two passages is more relevant? Passage A: "y"\n\nPassage B: "z"',
    "Query: where do owls sleep? Document: The owl sleeps by day, and hunts mice by night. Relevant: true false",
    "<Instruct>: retrieve\n<Query>: q\n<Document>: d\n  leading   and trailing   spaces\tand\n\n\nnew lines \n \n",
    "Answer with Yes or No only. yes no 0 1 2 3 4 5 6 7 8 9 10 [1] > [2] > [3] (4) {5} it's they're don't 'quoted'",
    "Café Zürich: naïve façade, 東京は大きい。 Москва тоже. What is 3.14159 times 2? About 6.28318!",
    "system user assistant query document instruction: You are RankLLM, an intelligent assistant. Okay, provide.",
]
LETTERS = [chr(c) for c in range(33, 127)]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set sys = false %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{% if sys and loop.first %}{% set text = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # no system role, alternating turns
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def wrap(tokenizer: tokenizers.Tokenizer, chat_template: str | None, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = chat_template
    return fast


def bos_first(tokenizer: tokenizers.Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def special(*contents: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(content, normalized=False, special=True, **flags) for content in contents]


def byte_level(split: str | None, size: int = 900) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def qwen() -> Any:
    """Byte-level BPE, ChatML, no BOS; <think> is an added token that is not flagged special."""
    tokenizer = byte_level(QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool_call>")])
    return wrap(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gpt2() -> Any:
    """GPT-2's own split, no chat template."""
    tokenizer = byte_level(None)
    tokenizer.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return wrap(tokenizer, None, eos_token="<|endoftext|>")


def llama3() -> Any:
    """Byte-level BPE that takes whole words from the vocabulary first; BOS in template and post-processor; trims."""
    tokenizer = byte_level(LLAMA3_SPLIT)
    data = json.loads(tokenizer.to_str())
    data["model"]["ignore_merges"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    bos_first(tokenizer, "<|begin_of_text|>")
    return wrap(tokenizer, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def sentencepiece_bpe(specials: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> Any:
    """Sentencepiece-like BPE over the whole text: space is ▁, nothing splits words, bytes as the last resort."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    # Merges are learned within words, as sentencepiece does, and applied without splitting.
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1100, special_tokens=[*specials, *bytes_], initial_alphabet=[*LETTERS, "▁"], show_progress=False
    )
    trained.train_from_iterator(CORPUS * 3, trainer)
    data = json.loads(trained.to_str())
    data["model"].update(byte_fallback=True, fuse_unk=True)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    data["pre_tokenizer"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def llama2() -> Any:
    """Prepends ▁ to every run; [INST] is plain text; BOS from the chat template and the post-processor."""
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bos_first(tokenizer, "<s>")
    return wrap(tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def zephyr() -> Any:
    """As Llama 2, with a chat template that holds no BOS: the post-processor's is kept."""
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bos_first(tokenizer, "<s>")
    return wrap(tokenizer, ZEPHYR, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral() -> Any:
    """Metaspace that marks the start of the prompt only; [INST] is a special token; no system role."""
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(special("[INST]", "[/INST]"))
    bos_first(tokenizer, "<s>")
    return wrap(tokenizer, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma() -> Any:
    """No dummy prefix, runs of white space as ordinary added tokens, no system role, trims."""
    tokenizer = sentencepiece_bpe(specials=("<pad>", "<eos>", "<bos>", "<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    spaces = ["\n" * n for n in range(1, 6)] + ["▁" * n for n in range(2, 5)] + ["  ", "   "]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in spaces])
    tokenizer.add_special_tokens(special("<start_of_turn>", "<end_of_turn>"))
    bos_first(tokenizer, "<bos>")
    return wrap(tokenizer, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def phi3() -> Any:
    """Special tokens that swallow the white space behind them."""
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(special("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", rstrip=True))
    bos_first(tokenizer, "<s>")
    return wrap(tokenizer, PHI3, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")


T5_WORDS = ("true", "false")  # monoT5's labels


def t5() -> Any:
    """Unigram that folds white space, </s> at the end, extra ids; special tokens are pieces of the vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    fold = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"[ \n\r\t]+"), " ")])
    tokenizer.normalizer = fold
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=260,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"] += [[f"▁{word}", -2.0] for word in T5_WORDS]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(special("<extra_id_0>", "<extra_id_10>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return wrap(tokenizer, None, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


STYLES: dict[str, Callable[[], Any]] = {
    "qwen": qwen,
    "gpt2": gpt2,
    "llama3": llama3,
    "llama2": llama2,
    "zephyr": zephyr,
    "mistral": mistral,
    "gemma": gemma,
    "phi3": phi3,
    "t5": t5,
}


# With these learned, yes and no are single tokens wherever an answer may stand.
ANSWERS = ["yes\nno\nYes\nNo\n(yes)(no)(Yes)(No)]Yes]No"] * 8


def save(style: str, folder: Path, answers: bool = False) -> Path:
    """Save a tokenizer of a style; with `answers` it has yes and no as tokens."""
    with mock.patch.object(sys.modules[__name__], "CORPUS", [*CORPUS, *(ANSWERS if answers else [])]):
        STYLES[style]().save_pretrained(folder)
    return folder


@functools.cache
def tokenizer_of(style: str) -> Any:
    """The tokenizer of a style, trained once."""
    return STYLES[style]()


@functools.cache
def prompts_of(style: str, name: str, **options: Any) -> Any:
    """The prompts of a template in a style's ids, made once."""
    from fastrerank.inputs.prompts import Template
    from fastrerank.inputs.prompts.prompt_tokenizer import PromptTokenizer

    return PromptTokenizer(tokenizer_of(style), Template.load(name), **options)


def count_of(template: Any, count: int = 3) -> int:
    """How many documents a prompt of the template holds; `count` where it may be any number."""
    return {"pointwise": 1, "pairwise": 2}.get(template.kind, count)
