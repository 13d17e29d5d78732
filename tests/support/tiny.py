"""Tiny random checkpoints of every family, made from transformers' own classes, so that no download is needed.

Sizes are odd on purpose: head sizes that are no multiple of a vector, an intermediate size that is no multiple of 4.
Weights are drawn large enough that attention is far from uniform and that logits spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

torch.set_num_threads(1)  # for these sizes, waking a second thread takes longer than the work

FAMILIES = (
    "bert",
    "bert-relu",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "electra-narrow",
    "distilbert",
    "modernbert",
    "modernbert-mean",
)
MAX_LENGTH = 160
MODERNBERT_WINDOW = 8  # tokens on either side of a local layer's token: local_attention / 2

_TEXT = (
    "the owl sleeps by day and hunts mice at night a flea lives up to one year cats sleep all day rerankers read query "
    "passage together what is where do how long live city river old bank water light green stone paper machine"
)
WORDS = _TEXT.split()
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = len({*BERT_SPECIALS, *ALPHABET, *(f"##{c}" for c in ALPHABET), *WORDS})

_COMMON = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 50}
_POSITIONS = {"max_position_embeddings": MAX_LENGTH, "type_vocab_size": 2, "pad_token_id": 0}
_ROBERTA = {
    "num_hidden_layers": 3,
    "intermediate_size": 50,
    "max_position_embeddings": MAX_LENGTH + 2,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_MODERNBERT = {
    "num_hidden_layers": 4,
    "intermediate_size": 50,
    "max_position_embeddings": MAX_LENGTH,
    "local_attention": 2 * MODERNBERT_WINDOW,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 0,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _COMMON | _POSITIONS),
    "bert-relu": ("Bert", _COMMON | _POSITIONS | {"hidden_act": "relu", "num_attention_heads": 5}),
    "roberta": ("Roberta", _ROBERTA | {"hidden_size": 96, "num_attention_heads": 3}),
    "xlm-roberta": ("XLMRoberta", _ROBERTA | {"hidden_size": 40, "num_attention_heads": 2}),
    "camembert": ("Camembert", _ROBERTA | {"hidden_size": 48, "num_attention_heads": 3, "hidden_act": "gelu_new"}),
    "electra": ("Electra", _COMMON | _POSITIONS | {"embedding_size": 40}),
    "electra-narrow": ("Electra", _COMMON | _POSITIONS | {"embedding_size": 22}),
    "distilbert": (
        "DistilBert",
        {
            "dim": 40,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 50,
            "pad_token_id": 0,
            "max_position_embeddings": MAX_LENGTH,
        },
    ),
    "modernbert": ("ModernBert", _MODERNBERT | {"hidden_size": 48, "num_attention_heads": 3}),
    "modernbert-mean": (
        "ModernBert",
        _MODERNBERT
        | {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "classifier_pooling": "mean",
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
        },
    ),
}


def is_roberta(family: str) -> bool:
    return "roberta" in family or family == "camembert"


def special_ids(family: str) -> tuple[int, int]:
    """(first, separator) of the family's tokenizer."""
    return (0, 2) if is_roberta(family) else (2, 3)


def build(family: str, labels: int = 1, seed: int = 0) -> torch.nn.Module:
    """A float32 sequence classification model in evaluation mode."""
    name, settings = _SETTINGS[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, num_labels=labels, **settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return randomised(model, seed)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with random weights that spread its scores, in evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 2:
                embedding = "embeddings." in name
                parameter.copy_(noise * (0.5 if embedding else 1.5 * parameter.shape[1] ** -0.5))
            else:
                parameter.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def save(
    folder: Path,
    family: str,
    *,
    labels: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    shard_size: str | None = None,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Save `build(...)` and a tokenizer to `folder`; `change` maps the stored tensors (one file only)."""
    model = build(family, labels, seed).to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    if change is not None:
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder, family)
    return folder


def save_tokenizer(folder: Path, family: str) -> None:
    specials = ROBERTA_SPECIALS if is_roberta(family) else BERT_SPECIALS
    unknown = next(token for token in specials if "unk" in token.lower())
    vocabulary = [*specials, *ALPHABET, *(f"##{c}" for c in ALPHABET)]
    vocabulary += [word for word in dict.fromkeys(WORDS) if word not in vocabulary]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(specials)
    first, last = ("<s>", "</s>") if is_roberta(family) else ("[CLS]", "[SEP]")
    pair = f"{first} $A {last} {last} $B {last}" if is_roberta(family) else f"{first} $A {last} $B:1 {last}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=pair, special_tokens=[(first, ids[first]), (last, ids[last])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "attention_mask"]
    if not is_roberta(family) and not family.startswith(("distilbert", "modernbert")):
        names.insert(1, "token_type_ids")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "model_input_names": names,
        "pad_token": "<pad>" if is_roberta(family) else "[PAD]",
        "unk_token": unknown,
        "cls_token": first,
        "sep_token": last,
        "mask_token": "<mask>" if is_roberta(family) else "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Texts of 1 to `longest` words of the vocabulary, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)

    def number(limit: int) -> int:
        return int(torch.randint(limit, (), generator=random))

    return [" ".join(WORDS[number(len(WORDS))] for _ in range(1 + number(longest))) for _ in range(count)]
