"""A template laid out for a number of documents: literals, and slots for user texts."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastrerank.inputs.prompts.chat_rendering import TemplateBudgetError
from fastrerank.inputs.prompts.template import Template, parse_format

__all__ = ["Piece", "Slot", "Turn", "Values", "contents", "expand", "fill", "options", "render_chat"]

Render = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True)
class Slot:
    """A place for a user text.

    Attributes:
        name: "query", "instruction", "document" or "note".
        index: which document of the list it belongs to; 0 for the others.
        lstrip, rstrip: the chat template strips this side of the text, as it stands at an end of its turn.
        before, after: how many characters of white space around an empty text the chat template strips with it.
    """

    name: str
    index: int = 0
    lstrip: bool = False
    rstrip: bool = False
    before: int = 0
    after: int = 0


Piece = str | Slot


@dataclass(frozen=True)
class Turn:
    """One turn of a chat, or (role "") one raw text."""

    role: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Values:
    """The user texts of one prompt."""

    query: str
    instruction: str
    documents: Sequence[str]
    notes: Sequence[str]

    def of(self, slot: Slot) -> str:
        """The text of a slot, stripped as the chat template does."""
        if slot.name == "document":
            text = self.documents[slot.index]
        elif slot.name == "note":
            text = self.notes[slot.index]
        else:
            text = self.query if slot.name == "query" else self.instruction
        if slot.lstrip:
            text = text.lstrip()
        return text.rstrip() if slot.rstrip else text


def expand(template: Template, count: int, instruction: str) -> list[Turn]:
    """The turns of a prompt with `count` documents (for raw texts: one turn without a role per text)."""
    places = list(range(count))
    if template.order == "reversed":
        places.reverse()
    if not template.messages:
        texts = template.segments or template.pair or (template.text,)
        return [Turn("", _pieces(template, text, places, instruction)) for text in texts]
    turns: list[Turn] = []
    position = 0
    while position < len(template.messages):
        repeated = []
        while position < len(template.messages) and template.messages[position].repeat:
            repeated.append(template.messages[position])
            position += 1
        turns += [
            Turn(m.role, _pieces(template, m.content, places, instruction, place)) for place in places for m in repeated
        ]
        if position < len(template.messages) and not repeated:
            message = template.messages[position]
            turns.append(Turn(message.role, _pieces(template, message.content, places, instruction)))
            position += 1
    return turns


def fill(pieces: Sequence[Piece], values: Values) -> str:
    """The pieces with their texts, as one string."""
    return "".join(piece if isinstance(piece, str) else values.of(piece) for piece in pieces)


def render_chat(template: Template, turns: list[Turn], render: Render) -> tuple[list[Turn], list[Piece]]:
    """Return the turns as a chat template takes them, and the whole prompt that it makes of them.

    The template sees a neutral word in place of each user text, so nothing in a text can change the layout. Where it
    has no system role, the system turn moves into the first user turn if `template` says how.

    Raises ValueError naming what the chat template drops, or what it raises.
    """
    turns = _fit_system(template, turns, render)
    _check_turns(template, turns, render)
    words = _Words()
    slots: list[Slot] = []
    messages: list[dict[str, str]] = []
    padded: list[dict[str, str]] = []
    for turn in turns:
        content = wide = ""
        for position, piece in enumerate(turn.pieces):
            if isinstance(piece, str):
                content, wide = content + piece, wide + piece
                continue
            word = words.word(len(slots))
            content, wide = content + word, f"{wide} \n{word} \n"
            slots.append(_with_strips(turn.pieces, position))
        messages.append({"role": turn.role, "content": content})
        padded.append({"role": turn.role, "content": wide})
    prompt, wide_prompt = words.split(_call(render, messages, template)), _call(render, padded, template)
    found = [place for place in prompt if isinstance(place, int)]
    for i, slot in enumerate(slots):
        what = slot.name if slot.name in ("query", "instruction") else f"{slot.name} {slot.index + 1}"
        if i not in found:
            raise ValueError(f"the checkpoint's chat template drops the {what} of template {template.name!r}")
        if slot.name == "document" and found.count(i) > 1:
            raise ValueError(f"the checkpoint's chat template prints the {what} more than once")
        word = words.word(i)
        lstrip, rstrip = f" \n{word}" not in wide_prompt, f"{word} \n" not in wide_prompt
        slots[i] = replace(
            slot, lstrip=lstrip, rstrip=rstrip, before=slot.before if rstrip else 0, after=slot.after if lstrip else 0
        )
    return turns, [slots[piece] if isinstance(piece, int) else piece for piece in prompt]


def _pieces(
    template: Template, text: str, places: Sequence[int], instruction: str, place: int | None = None
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for literal, name in parse_format(text):
        pieces.append(literal)
        if name == "documents":
            for position, index in enumerate(places):
                pieces.append(template.separator if position else "")
                pieces += _pieces(template, template.document, places, instruction, index)
        elif name == "instruction":
            if instruction:
                for before, slot in parse_format(template.instruction_format):
                    pieces += [before, *([] if slot is None else [Slot("instruction")])]
        elif name == "count":
            pieces.append(str(len(places)))
        elif name == "identifier":
            pieces.append(template.identifier(place or 0))
        elif name in ("document_a", "document_b"):
            pieces.append(Slot("document", int(name == "document_b")))
        elif name is not None:
            pieces.append(Slot(name, place or 0))
    return _merge(pieces)


def _merge(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Neighbouring literals as one, without empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif piece != "":
            merged.append(piece)
    return tuple(merged)


def _with_strips(pieces: Sequence[Piece], position: int) -> Slot:
    slot = pieces[position]
    assert isinstance(slot, Slot)
    before = pieces[position - 1] if position else ""
    after = pieces[position + 1] if position + 1 < len(pieces) else ""
    last, first = position + 1 == len(pieces), position == 0
    return replace(
        slot,
        before=len(before) - len(before.rstrip()) if last and isinstance(before, str) else 0,
        after=len(after) - len(after.lstrip()) if first and isinstance(after, str) else 0,
    )


class _Words:
    """Words that stand for user texts: letters and digits only, so that no chat template alters them."""

    def __init__(self) -> None:
        self._nonce = "w" + secrets.token_hex(8) + "n"

    def word(self, number: int) -> str:
        return f"{self._nonce}{number}e"

    def split(self, text: str) -> list[str | int]:
        parts = re.split(f"{self._nonce}(\\d+)e", text)
        return [int(part) if i % 2 else part for i, part in enumerate(parts) if i % 2 or part]


def _call(render: Render, messages: list[dict[str, str]], template: Template) -> str:
    try:
        return render(messages)
    except TemplateBudgetError:
        raise
    except Exception as error:  # chat templates raise jinja2's errors, and whatever their own code runs into
        roles = ", ".join(message["role"] for message in messages[:6])
        raise ValueError(
            f"the checkpoint's chat template refuses template {template.name!r} (turns: {roles}): {error}"
        ) from error


def _dropped(turns: Sequence[Turn], render: Render, template: Template) -> list[int]:
    words = _Words()
    text = _call(render, [{"role": t.role, "content": words.word(i)} for i, t in enumerate(turns)], template)
    return [i for i in range(len(turns)) if words.word(i) not in text]


def _fit_system(template: Template, turns: list[Turn], render: Render) -> list[Turn]:
    if turns[0].role != "system":
        return turns
    try:
        if 0 not in _dropped(turns, render, template):
            return turns
        reason: ValueError | None = None
    except TemplateBudgetError:
        raise
    except ValueError as error:
        _call(render, _plain(turns[1:]), template)  # raises, where the system turn is not the cause
        reason = error
    if template.system_joiner is None:
        raise ValueError(
            f"the checkpoint's chat template has no system role, which template {template.name!r} needs; a copy of the "
            'template with system_joiner = "\\n\\n" prints the system text before the first user turn'
        ) from reason
    user = turns[1]
    return [Turn(user.role, _merge([*turns[0].pieces, template.system_joiner, *user.pieces])), *turns[2:]]


def _plain(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": "text"} for turn in turns]


def _check_turns(template: Template, turns: Sequence[Turn], render: Render) -> None:
    for i in _dropped(turns, render, template):
        documents = [piece for piece in turns[i].pieces if isinstance(piece, Slot) and piece.name == "document"]
        holds = f", which holds document {documents[0].index + 1}" if documents else ""
        raise ValueError(
            f"the checkpoint's chat template drops turn {i + 1} (role {turns[i].role!r}) of template "
            f"{template.name!r}{holds}"
        )


def options(template: Template) -> Mapping[str, Any]:
    """Keyword arguments for apply_chat_template."""
    return {"add_generation_prompt": True, **template.chat_options, "tokenize": False}


def contents(template: Template, messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The messages as the chat template takes them: contents as text, or each as a list of one part."""
    if template.content == "text":
        return list(messages)
    return [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
