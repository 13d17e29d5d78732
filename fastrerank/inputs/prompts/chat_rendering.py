"""Rendering of a checkpoint's chat template under a budget of steps, characters and time."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["MOST_CHARS", "MOST_SECONDS", "MOST_STEPS", "TemplateBudgetError", "render"]

# The budget of one rendering: steps (turns of loops, calls, filters), characters of all texts that it makes, seconds.
# Published templates take some hundred steps and a few milliseconds.
MOST_STEPS, MOST_CHARS, MOST_SECONDS = 100_000, 4_000_000, 5.0
_MOST_SOURCE = 150_000
# The largest operand or argument that makes a text or list grow, and the most bits of a product.
_MOST_ARGUMENT, _MOST_BITS = 100_000, 4096
_NUMBERS = re.compile(r"\d+")
_KEPT_TEMPLATES = 16


class TemplateBudgetError(ValueError):
    """A chat template exceeds what its rendering may take."""


class _Budget(threading.local):
    """What is left of this thread's rendering."""

    def __init__(self) -> None:
        self.start(MOST_SECONDS)

    def start(self, seconds: float) -> None:
        self.steps, self.chars, self.end = 0, 0, time.monotonic() + seconds

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MOST_STEPS:
            raise TemplateBudgetError(f"it takes more than {MOST_STEPS:,} steps of loops, calls and filters")
        if time.monotonic() > self.end:
            raise TemplateBudgetError(f"it takes more than {MOST_SECONDS:g} seconds")

    def make(self, size: int) -> None:
        """Count a text or a collection that is about to be made."""
        self.chars += size
        if self.chars > MOST_CHARS:
            raise TemplateBudgetError(f"it makes more than {MOST_CHARS:,} characters of text")


_budget = _Budget()
_lock = threading.Lock()
_compiled: dict[str, Any] = {}


def render(tokenizer: Any, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """Equals `tokenizer.apply_chat_template(messages, tokenize=False, **arguments)` of transformers, within a budget.

    Args:
        tokenizer: a tokenizer of transformers; its chat template and special tokens are read.
        messages: turns with role and content.
        arguments: of the template: add_generation_prompt, tools, documents, and what it knows itself.

    Raises TemplateBudgetError, a ValueError, that names the checkpoint and what was exceeded; jinja2's errors for a
    template that is none or that refuses the messages.

    Example:
        >>> render(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)  # doctest: +SKIP
        '<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    arguments.pop("tokenize", None)
    from transformers import PreTrainedTokenizerBase

    own = type(tokenizer).apply_chat_template
    if own is not PreTrainedTokenizerBase.apply_chat_template:  # the checkpoint's own code, which the user trusted
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    source = arguments.pop("chat_template", None)
    source = tokenizer.get_chat_template(source, arguments.get("tools"))
    known = {"tools": None, "documents": None, "add_generation_prompt": False}
    values = {**known, **tokenizer.special_tokens_map, **arguments}
    _budget.start(MOST_SECONDS)
    try:
        return str(_template(source).render(messages=messages, **values))
    except TemplateBudgetError as error:
        where = getattr(tokenizer, "name_or_path", "") or "the checkpoint"
        raise TemplateBudgetError(f"{where}: the rendering of its chat template was stopped, as {error}") from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(f"the chat template cannot be rendered: {type(error).__name__} {error}") from None


def _template(source: str) -> Any:
    if len(source) > _MOST_SOURCE:
        raise TemplateBudgetError(f"it is {len(source):,} characters long, and {_MOST_SOURCE:,} are the most")
    with _lock:
        if source not in _compiled:
            while len(_compiled) >= _KEPT_TEMPLATES:
                _compiled.pop(next(iter(_compiled)))
            _compiled[source] = _environment().from_string(source)
        return _compiled[source]


@functools.cache
def _environment() -> Any:
    """The environment in which transformers renders chat templates, with its operations counted."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.runtime import markup_join
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class Generator(CodeGenerator):
        def visit_For(self, node: Any, frame: Any) -> None:
            counted = nodes.EnvironmentAttribute("counted", lineno=node.lineno)
            node.iter = nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
            super().visit_For(node, frame)

        def visit_Concat(self, node: Any, frame: Any) -> None:
            parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
            state = frame.eval_ctx
            self.write("environment.joined(")
            self.visit(parts, frame)
            self.write(f", {'context.eval_ctx.volatile' if state.volatile else bool(state.autoescape)})")

        def _collection(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
            self.write("environment.sized(")
            visit(node, frame)
            self.write(")")

        def visit_List(self, node: Any, frame: Any) -> None:
            self._collection(super().visit_List, node, frame)

        def visit_Dict(self, node: Any, frame: Any) -> None:
            self._collection(super().visit_Dict, node, frame)

        def visit_Tuple(self, node: Any, frame: Any) -> None:
            if node.ctx == "load":
                self._collection(super().visit_Tuple, node, frame)
            else:
                super().visit_Tuple(node, frame)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

        def counted(self, items: Any) -> Iterator[Any]:
            return _counted(items)

        def joined(self, parts: Iterable[Any], escaped: bool) -> str:
            texts = []
            for part in parts:
                sized(part)
                texts.append(part if escaped and hasattr(part, "__html__") else str(part))
                _budget.make(len(texts[-1]))
            return markup_join(texts) if escaped else "".join(texts)

        def sized(self, value: Any) -> Any:
            return sized(value)

        def concat(self, parts: Iterable[str]) -> str:
            texts = []
            for part in parts:
                _budget.step()
                _budget.make(len(part))
                texts.append(part)
            return "".join(texts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return sized(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(obj, "__self__", None)  # of str.format, which the sandbox wraps, a level down
            owner = getattr(getattr(obj, "__wrapped__", None), "__self__", None) if owner is None else owner
            _check_call(getattr(obj, "__name__", ""), owner, args, kwargs)
            return sized(super().call(context, obj, *args, **kwargs))

    theirs = _compile_jinja_template("").environment
    made = Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        keep_trailing_newline=theirs.keep_trailing_newline,
        extensions=[type(one) for one in theirs.extensions.values()],
        finalize=_finalized,
        optimized=False,
        cache_size=0,
    )
    made.globals.update({name: value for name, value in theirs.globals.items() if name != "lipsum"})
    made.globals.pop("lipsum", None)  # it makes random text without end
    for name, filter_ in theirs.filters.items():
        made.filters[name] = _limited(name, filter_)
    made.tests.update(theirs.tests)
    return made


def sized(value: Any) -> Any:
    """Return `value` after counting everything in it: printing and comparing it visits all of that."""
    if isinstance(value, str):
        _budget.make(len(value))
    elif isinstance(value, (list, tuple, dict)) or type(value).__name__ == "TemplateNamespace":
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                _budget.make(len(one))
                continue
            _budget.make(1)
            if isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, (list, tuple)):
                waiting += one
            elif type(one).__name__ == "TemplateNamespace":
                waiting += object.__getattribute__(one, "_Namespace__attrs").values()
    return value


def _finalized(value: Any) -> Any:
    """What is printed; texts are counted where they are put together."""
    return value if isinstance(value, str) else sized(value)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    _budget.step()
    for item in items:
        _budget.step()
        yield item


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict, bytes)) else 1


def _check_operands(operator: str, left: Any, right: Any) -> None:
    _budget.step()
    if operator == "+":
        _budget.make(_length(left) + _length(right))
    elif operator == "%" and isinstance(left, (str, bytes)):
        _check_format(str(left), right if isinstance(right, (tuple, dict)) else (right,), {})
    elif operator in ("*", "**"):
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers:
            bits = int(left).bit_length() * (max(0, int(right)) if operator == "**" else 1)
            if bits + int(right).bit_length() > _MOST_BITS:
                raise TemplateBudgetError(f"it makes a number of more than {_MOST_BITS:,} bits")
        elif isinstance(left, int) or isinstance(right, int):
            count, sequence = (left, right) if isinstance(left, int) else (right, left)
            _budget.make(max(0, int(count)) * _length(sequence))


def _check_call(name: str, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Count a call, and refuse what would make a text that is too long."""
    _budget.step()
    for value in (*args, *kwargs.values()):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > _MOST_ARGUMENT:
            raise TemplateBudgetError(f"it passes the number {value} to {name or 'a call'}")
    if isinstance(owner, (str, bytes)):
        if name in ("format", "format_map"):
            _check_format(str(owner), args, kwargs)
        elif name == "replace" and args:
            _check_replace(str(owner), args)
        elif name == "join" and args:
            _check_join(str(owner), args[0])
        elif name in ("expandtabs", "translate"):
            _budget.make(len(owner) * max([8, *(value for value in args if isinstance(value, int))]))
        else:
            _budget.make(len(owner))


def _check_format(text: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """An upper bound of the characters that a format makes: its widths, plus its fields times its arguments."""
    values = list(args.values()) if isinstance(args, dict) else list(args)
    sizes = 32
    for value in (*values, *kwargs.values()):
        before = _budget.chars
        sized(value)
        sizes += _budget.chars - before
        if isinstance(value, int) and "*" in text:
            _budget.make(abs(int(value)))
    fields = text.count("{") + text.count("%")
    _budget.make(len(text) + fields * sizes + sum(int(number[:9]) for number in _NUMBERS.findall(text)))


def _check_replace(text: str, args: tuple[Any, ...]) -> None:
    old, new = str(args[0]), str(args[1]) if len(args) > 1 else ""
    _budget.make(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_join(separator: str, items: Any) -> None:
    if isinstance(items, (list, tuple)):
        _budget.make(len(items) * len(separator))
        sized(items)


def _limited(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are counted."""
    skip = 1 if getattr(filter_, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(filter_)
    def counted(*args: Any, **kwargs: Any) -> Any:
        value, rest = args[skip] if len(args) > skip else None, args[skip + 1 :]
        _check_call(name, None, rest, kwargs)
        if name == "replace" and len(rest) > 1:
            _check_replace(str(value), rest)
        elif name == "join":
            items = value if isinstance(value, (list, tuple)) else list(_counted(value or ()))
            _check_join(str(rest[0] if rest else kwargs.get("d", "")), items)
            args = (*args[:skip], items, *rest)
        elif name == "format":
            _check_format(str(value), rest, kwargs)
        elif name == "indent":
            width = rest[0] if rest else kwargs.get("width", 4)
            _budget.make(str(value).count("\n") * (width if isinstance(width, int) else len(str(width))))
        else:
            sized(value)
        return sized(filter_(*args, **kwargs))

    return counted
