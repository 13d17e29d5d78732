"""Tokenizer files of a checkpoint folder, read the way that transformers' tokenizer classes read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrerank.checkpoints.checkpoint import Checkpoint, read_json
from fastrerank.inputs.screening import check_parts, check_strings, loaded

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ChatTemplate", "chat_template_of", "load_tokenizer", "template_of_pairs"]

ChatTemplate = str | dict[str, str]

_WORDPIECE_TOKENS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_ROBERTA_LIKE = ("roberta", "bart", "longformer", "led", "mvp")
_CONVERT = 'make one with transformers: AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'


def load_tokenizer(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Load tokenizer.json of `folder`, else vocab.json with merges.txt, else a BERT vocab.txt.

    `settings` is its tokenizer_config.json. Raises FileNotFoundError if there is none of them, ValueError naming the
    file if it is damaged.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        tokenizer = _from_json(file, settings)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _from_merges(folder, settings)
    else:
        tokenizer = _from_wordpiece(folder, settings)
    if read_json(folder / "sentence_bert_config.json").get("do_lower_case"):
        from tokenizers import normalizers

        present = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *present])
    return tokenizer


def chat_template_of(folder: Path) -> ChatTemplate | None:
    """The chat template that transformers finds in a checkpoint folder, several by their names; None without one."""
    stored = read_json(folder / "tokenizer_config.json").get("chat_template")
    named = {one["name"]: one["template"] for one in stored} if isinstance(stored, list) else {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        named["default"] = file.read_text(encoding="utf-8")
    elif isinstance(stored, str):
        named["default"] = stored
    named |= {one.stem: one.read_text(encoding="utf-8") for one in folder.glob("additional_chat_templates/*.jinja")}
    return named["default"] if list(named) == ["default"] else named or None


def template_of_pairs(checkpoint: Checkpoint, given: ChatTemplate | None = None) -> ChatTemplate | None:
    """The chat template by which sentence-transformers renders this checkpoint's pairs; None where it joins them.

    Pairs of a folder that it saved before it knew messages are joined, whatever template the tokenizer has. `given` is
    a template in place of the checkpoint's, or several by their names, which always render; "" always joins.
    """
    if given is not None:
        return given or None
    if checkpoint.modules and "message" not in (checkpoint.sentence_config().get("modality_config") or {}):
        return None
    return chat_template_of(checkpoint.transformer_path)


def _from_json(file: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    check_strings(file)
    tokenizer = loaded(lambda: tokenizers.Tokenizer.from_file(str(file)), file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    check_parts(tokenizer, file)
    # The tokenizer classes of transformers let tokenizer_config.json overrule these parts of tokenizer.json; its
    # generic class, which has no options of its own, does not.
    if settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return tokenizer
    normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        # A setting that is left out has the class's default value, whatever tokenizer.json says.
        normalizer.lowercase = settings.get("do_lower_case", True)
        normalizer.strip_accents = settings.get("strip_accents")
        normalizer.handle_chinese_chars = settings.get("tokenize_chinese_chars", True)
        tokenizer.normalizer = normalizer
    if isinstance(splitter, tokenizers.pre_tokenizers.ByteLevel):
        splitter.add_prefix_space = settings.get("add_prefix_space", splitter.add_prefix_space)
        tokenizer.pre_tokenizer = splitter
    return tokenizer


def _from_merges(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The byte-level BPE that transformers' class for RoBERTa makes of vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    convert = _CONVERT.format(folder=folder)
    config = read_json(folder / "config.json")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or config.get("model_type") or "roberta"
    if not str(name).lower().startswith(_ROBERTA_LIKE):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, and its vocab.json and merges.txt are those of {name}, where RoBERTa's "
            f"and BART's can be read; {convert}"
        )
    if read_json(folder / "added_tokens.json"):
        raise FileNotFoundError(f"{folder} has an added_tokens.json and no tokenizer.json; {convert}")
    file = folder / "vocab.json"
    vocabulary, merges = loaded(lambda: models.BPE.read_file(str(file), str(folder / "merges.txt")), file)
    model = loaded(
        lambda: models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False),
        folder / "merges.txt",
    )
    tokenizer = Tokenizer(model)
    stored = {**_ROBERTA_TOKENS, **read_json(folder / "special_tokens_map.json"), **settings}
    tokens: dict[str, AddedToken] = {}
    for key in _ROBERTA_TOKENS:
        value = stored[key]
        value = value if isinstance(value, Mapping) else {"content": value}
        flags = {flag: bool(value.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
        tokens[key] = AddedToken(str(value["content"]), special=True, **flags)
    missing = [token.content for token in tokens.values() if token.content not in vocabulary]
    if missing:
        raise ValueError(f"{file} is not a RoBERTa vocabulary (no {', '.join(missing)}); {convert}")
    tokenizer.add_special_tokens(list(tokens.values()))
    prefix = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    first, last = ((tokens[key].content, vocabulary[tokens[key].content]) for key in ("cls_token", "sep_token"))
    trims = bool(settings.get("trim_offsets", True))
    tokenizer.post_processor = processors.RobertaProcessing(last, first, trim_offsets=trims, add_prefix_space=prefix)
    return tokenizer


def _from_wordpiece(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    convert = _CONVERT.format(folder=folder)
    file = folder / "vocab.txt"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json (nor a vocab.json with merges.txt, nor a BERT vocab.txt); {convert}"
        )
    vocabulary = models.WordPiece.read_file(str(file))
    tokens: dict[str, str] = {}
    for key, default in _WORDPIECE_TOKENS.items():
        value = settings.get(key, default)
        tokens[key] = value["content"] if isinstance(value, Mapping) else value
    missing = [tokens[key] for key in ("unk_token", "cls_token", "sep_token") if tokens[key] not in vocabulary]
    if missing:
        raise ValueError(f"{file} is not a BERT vocabulary (no {', '.join(missing)}) and no tokenizer.json; {convert}")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk_token"]))
    tokenizer.add_special_tokens([token for token in tokens.values() if token in vocabulary])
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {key: vocabulary[token] for key, token in tokens.items() if token in vocabulary}
    tokenizer.post_processor = processors.BertProcessing(
        (tokens["sep_token"], ids["sep_token"]), (tokens["cls_token"], ids["cls_token"])
    )
    return tokenizer
