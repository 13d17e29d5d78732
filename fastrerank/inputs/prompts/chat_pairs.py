"""Pairs through a checkpoint's own chat template, as sentence-transformers 6 puts them to a cross-encoder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.inputs.files import ChatTemplate, template_of_pairs
from fastrerank.inputs.limits import NO_LIMITS, TextLimits, TooLong
from fastrerank.inputs.prompts.chat_rendering import TemplateBudgetError, render
from fastrerank.inputs.prompts.compiler import Kept
from fastrerank.inputs.prompts.prompt_tokenizer import PromptTokenizer
from fastrerank.inputs.prompts.template import Message, Template
from fastrerank.inputs.prompts.template_layout import contents, options
from fastrerank.inputs.screening import load_fast
from fastrerank.inputs.tokenizer import TokenBatch
from fastrerank.runtime.naming import model_name

__all__ = ["ChatPairs", "chat_tokenizer", "joined_template", "pair_template"]

log = logging.getLogger("fastrerank")

# Model types whose chat templates take plain text although their source looks as if it takes lists of parts, and the
# pattern of such a source.
_PLAIN_TEXT = ("apertus", "deepseek_v3", "gpt_oss", "seed_oss")
_PARTS = ("content[0]", ".type", "'type'", '"type"', "message.content[")
# A pair, and the same with one side replaced: a template that prints both sides prints three different texts.
_PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))
# Two pairs whose texts end differently.
_ENDS = (("alpha", "bravo"), ("charlie 7", "foxtrot 9"))
# Layouts that are kept, one per system text and options. The bound is for calls that always bring new ones.
_KEPT_PROMPTS = 4
_CACHE_BYTES = 16 << 20


def pair_template(
    checkpoint: Checkpoint,
    chat_template: ChatTemplate | None,
    *,
    prompt: str = "",
    chat_options: Mapping[str, Any] | None = None,
) -> Template:
    """The two turns of a pair for a checkpoint: how contents are written, the arguments of its chat template.

    Args:
        checkpoint: opened checkpoint; what sentence-transformers saved in it is followed.
        chat_template: source of its chat template.
        prompt: text of a system turn; "" for none.
        chat_options: further arguments of the chat template, over the saved ones.
    """
    template = Template.load("sentence-transformers")
    saved = checkpoint.sentence_config()
    stored = (saved.get("processing_kwargs") or {}).get("chat_template") or {}
    arguments = {**template.chat_options, **stored, **(chat_options or {})}
    for name in ("restore_suffix", "padding", "truncation", "max_length", "return_tensors"):
        arguments.pop(name, None)  # of cutting, which is done on ids here: what follows the document is never cut
    style = ((saved.get("modality_config") or {}).get("message") or {}).get("format", "auto")
    if style not in ("flat", "structured"):
        plain = checkpoint.config.get("model_type") in _PLAIN_TEXT
        parts = not isinstance(chat_template, str) or any(sign in chat_template for sign in _PARTS)
        style = "flat" if plain or not parts else "structured"
    messages = (*([Message("system", "{instruction}")] if prompt else []), *template.messages)
    return replace(
        template,
        messages=messages,
        instruction=prompt,
        chat_options=MappingProxyType(arguments),
        content="text" if style == "flat" else "parts",
    )


def joined_template(prompt: str = "") -> Template:
    """A pair as the tokenizer joins it, the prompt before the query."""
    template = Template.load("sentence-transformers")
    return replace(
        template,
        messages=(),
        pair=("{instruction}{query}", "{document}"),
        instruction=prompt,
        special_tokens="auto",
        chat_options=MappingProxyType({}),
    )


def chat_tokenizer(checkpoint: Checkpoint, chat_template: ChatTemplate | None = None) -> Any | None:
    """The tokenizer whose chat template takes a checkpoint's pairs; None where the tokenizer joins them.

    Args: as in `ChatPairs.load`.

    A checkpoint's template that drops the query or the document, or refuses their roles, is not used, which the log
    says at WARNING; a given one raises ValueError. Where there are several templates by their names, one that takes the
    roles is enough: a call names it. Raises ImportError without transformers.
    """
    source = template_of_pairs(checkpoint, chat_template)
    if source is None:
        return None
    try:
        import jinja2  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{checkpoint.path} puts pairs through its chat template, which needs {error.name}: pip install "
            "'fastrerank[torch]'; CrossEncoder(..., chat_template='') joins them as the tokenizer does"
        ) from None
    tokenizer = load_fast(checkpoint.transformer_path, trust_remote_code=checkpoint.trust_remote_code)
    tokenizer.chat_template = source
    problem = _refusal(tokenizer, pair_template(checkpoint, source))
    if problem and isinstance(source, dict) and _working_names(checkpoint, tokenizer):
        return tokenizer
    if problem and chat_template:
        raise ValueError(f"chat_template must print the contents of the roles query and document: {problem}")
    if problem:
        log.warning(
            "%s: pairs are joined by the tokenizer, as its chat template cannot take the roles query and document (%s)",
            checkpoint.path,
            problem,
        )
        return None
    return tokenizer


class ChatPairs:
    """(query, document) pairs as the ids of the prompt that a chat template makes of them.

    Equals transformers' `apply_chat_template` on two turns with the roles "query" and "document", behind a system turn
    where there is a prompt, as long as the texts hold no special tokens; a text that does is plain text all the same.
    One object serves any number of threads.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any) -> None:
        self._checkpoint, self._tokenizer = checkpoint, tokenizer
        self._prompts: Kept[PromptTokenizer] = Kept(_KEPT_PROMPTS)  # by prompt and options
        self._warned = False
        # With several templates, the default one may not take pairs; every call then names another one.
        self._names = _working_names(checkpoint, tokenizer) if isinstance(tokenizer.chat_template, dict) else []
        if not self._names or "default" in self._names:
            self._laid_out("", {})

    def __repr__(self) -> str:
        return f"ChatPairs({model_name(self._checkpoint.path)!r})"

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, chat_template: ChatTemplate | None = None) -> ChatPairs | None:
        """The pairs of a checkpoint; None where its tokenizer joins them.

        Args:
            checkpoint: opened checkpoint.
            chat_template: source of a chat template in place of the checkpoint's, or several by their names; "" for
                none.

        Raises ValueError where the template prints a document twice or changes a text; else as `chat_tokenizer`.
        """
        tokenizer = chat_tokenizer(checkpoint, chat_template)
        return None if tokenizer is None else cls(checkpoint, tokenizer)

    def pair_list(
        self,
        pairs: Sequence[tuple[str, str]],
        max_length: int | None = None,
        *,
        prompt: str = "",
        chat_options: Mapping[str, Any] | None = None,
        limits: TextLimits = NO_LIMITS,
    ) -> TokenBatch:
        """Pack the prompts of N pairs of str.

        The document is cut to fit `max_length`, never what follows it. The query is cut only if it alone does not fit:
        to three quarters of the room. Where the template alone does not fit, it is cut before what follows its texts,
        as sentence-transformers does, and a warning says so. `prompt` is a system turn, `chat_options` are arguments of
        the chat template. `limits` are further limits of this call; its own `max_length` is not read.

        Raises ValueError where the template drops the prompt or a text, and for `truncation_side` "left" where it
        leaves no room for texts; TooLong where `limits.truncate` is False and a text would be cut.
        """
        prompts = self._laid_out(prompt, chat_options or {})
        if max_length is not None and max_length < _size(prompts, "") + 2:
            return self._cut_off(prompts, pairs, max_length, limits)
        members: dict[str, list[int]] = {}
        for i, (query, _) in enumerate(pairs):
            members.setdefault(query, []).append(i)
        rows: list[Any] = [None] * len(pairs)
        query_truncated = False
        for query, places in members.items():
            fitting, cut = prompts.within("the query", query, limits.max_tokens_per_query, limits)
            fitting, more = self._fitting(prompts, fitting, max_length)
            if more and max_length is not None and not limits.truncate:
                size = _size(prompts, prompts.bounded(query, max_length))
                raise TooLong("the query with the template", size, max_length)
            query_truncated |= cut or more
            rest = replace(limits, max_length=None, max_tokens_per_query=None)
            found = prompts.encode(fitting, [[pairs[i][1]] for i in places], max_length=max_length, limits=rest)
            for i, one in zip(places, found, strict=True):
                rows[i] = one
        ids = np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)])
        offsets = np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])]).astype(np.int64)
        truncated = np.array([bool(row.truncated.any()) for row in rows], np.bool_)
        return TokenBatch(ids, np.zeros(len(ids), np.int32), offsets, truncated, query_truncated)

    def _fitting(self, prompts: PromptTokenizer, query: str, limit: int | None) -> tuple[str, bool]:
        """The query, and whether it had to be cut so that a token of a document fits."""
        if limit is None:
            return query, False
        query = prompts.bounded(query, limit)
        if _size(prompts, query) < limit:
            return query, False
        room = limit - _size(prompts, "")
        for count in range(room * 3 // 4, -1, -1):  # a cut text can take a token more in its place than on its own
            shorter = prompts.shorten(query, count)
            if _size(prompts, shorter) < limit:
                break
        return shorter, True

    def _cut_off(
        self, prompts: PromptTokenizer, pairs: Sequence[tuple[str, str]], limit: int, limits: TextLimits
    ) -> TokenBatch:
        """Prompts of `limit` tokens, of a template that leaves no room for texts: cut before what follows the texts."""
        least = _size(prompts, "") + 2
        if not limits.truncate:
            raise TooLong("the chat template with a text", least, limit)
        if limits.cut_left():
            raise ValueError(
                f"truncation_side='left' cannot be honoured with max_length={limit}, which leaves no room for texts in "
                f"the chat template: max_length must be at least {least}, or truncation_side 'right' or None"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"max_length={limit} leaves no room for texts in the chat template, so that prompts are cut off "
                f"inside it and their scores mean little; it should be at least {least}",
                UserWarning,
                stacklevel=4,
            )
        own = replace(limits, max_length=None, max_tokens_per_query=None, truncation_side=None)
        whole, cut = [], []
        query_truncated = False
        for query, document in pairs:
            query, less = prompts.within("the query", query, limits.max_tokens_per_query, limits)
            query_truncated |= less
            # Tokens behind the first `limit` ones of a text are cut off in any case.
            (found,) = prompts.encode(prompts.bounded(query, limit), [[prompts.bounded(document, limit)]], limits=own)
            whole.append(found.ids)
            cut.append(bool(found.truncated.any()))
        end = min(_common_end(prompts), limit)
        rows = [
            np.concatenate([row[: limit - end], row[len(row) - end :]]) if len(row) > limit else row for row in whole
        ]
        ids = np.concatenate([np.zeros(0, np.int32), *rows])
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        longer = np.array([len(row) > limit for row in whole], np.bool_)
        truncated = longer | np.array(cut, np.bool_)
        return TokenBatch(ids, np.zeros(len(ids), np.int32), offsets, truncated, query_truncated or bool(longer.any()))

    def _check_name(self, chat_options: Mapping[str, Any]) -> None:
        """Raise ValueError if there are several templates, and the call's is none that takes a pair."""
        template = pair_template(self._checkpoint, self._tokenizer.chat_template, chat_options=chat_options)
        name = template.chat_options.get("chat_template", "default")
        if self._names and name in self._tokenizer.chat_template and name not in self._names:
            raise ValueError(
                f"the chat template {name!r} cannot take the roles query and document; processing_kwargs="
                f"{{'chat_template': {{'chat_template': name}}}} chooses one of {', '.join(map(repr, self._names))}"
            )

    def token_ids(self, *tokens: str) -> list[int]:
        """The ids of tokens; ValueError naming one that the tokenizer does not have."""
        found = [self._tokenizer.backend_tokenizer.token_to_id(token) for token in tokens]
        if None in found:
            raise ValueError(f"{self._checkpoint.path}: its tokenizer has no token {tokens[found.index(None)]!r}")
        return found

    def _laid_out(self, prompt: str, chat_options: Mapping[str, Any]) -> PromptTokenizer:
        def make(_: str) -> PromptTokenizer:
            self._check_name(chat_options)
            source = self._tokenizer.chat_template
            template = pair_template(self._checkpoint, source, prompt=prompt, chat_options=chat_options)
            return PromptTokenizer(self._tokenizer, template, readout="head", cache_bytes=_CACHE_BYTES)

        return self._prompts.get(repr((prompt, sorted(chat_options.items()))), make)


def _working_names(checkpoint: Checkpoint, tokenizer: Any) -> list[str]:
    """The names of the chat templates that take the roles of a pair."""
    named = [(name, {"chat_template": name}) for name in tokenizer.chat_template]
    source = tokenizer.chat_template
    return [
        name
        for name, options in named
        if not _refusal(tokenizer, pair_template(checkpoint, source, chat_options=options))
    ]


def _common_end(prompts: PromptTokenizer) -> int:
    """How many tokens follow the last text of every prompt."""
    first, second = (prompts.encode(query, [[document]])[0].ids[::-1] for query, document in _ENDS)
    size = min(len(first), len(second))
    return int(np.argmax([*(first[:size] != second[:size]), True]))


def _size(prompts: PromptTokenizer, query: str) -> int:
    return len(prompts.encode(query, [[""]])[0].ids)


def _refusal(tokenizer: Any, template: Template) -> str:
    """Why the chat template cannot take a pair's roles; "" where it can."""
    try:
        first, *others = [
            render(
                tokenizer,
                contents(template, [{"role": "query", "content": query}, {"role": "document", "content": document}]),
                **options(template),
            )
            for query, document in _PROBES
        ]
    except TemplateBudgetError:
        raise
    except Exception as error:  # chat templates raise jinja2's errors, and whatever their own code runs into
        return str(error) or type(error).__name__
    lost = [role for role, text in zip(("query", "document"), others, strict=True) if text == first]
    return f"it drops the {' and the '.join(lost)}" if lost else ""
