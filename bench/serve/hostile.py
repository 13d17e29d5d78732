"""Bodies that no honest client sends, each as large as a server takes, made from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

__all__ = ["KINDS", "bodies"]

# What is repeated to fill a document: text that is nothing but one thing.
FILLS = [
    "!?",
    "a",
    "的",
    "  \n",
    "😀",
    "ﷺ",
    "\\ud800",
    "\\u0000",
    "e\u0301",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ",
    '\\"',
    "#@ 1,",
]


def _filled(before: str, unit: str, after: str, size: int) -> bytes:
    count = max(1, (size - len(before) - len(after)) // len(unit.encode()))
    return (before + unit * count + after).encode()


def _listed(name: str, unit: str) -> Callable[[random.Random, int], bytes]:
    return lambda _, size: _filled('{"query":"q","' + name + '":[', unit + ",", unit + "]}", size)


def _document(_random: random.Random, size: int) -> bytes:
    return _filled('{"query":"q","documents":["', _random.choice(FILLS), '"]}', size)


def _query(_random: random.Random, size: int) -> bytes:
    return _filled('{"documents":["a","b"],"query":"', _random.choice(FILLS), '"}', size)


def _query_and_letters(_random: random.Random, size: int) -> bytes:
    query = _filled('{"query":"', _random.choice(FILLS), '","documents":[', min(size, 99 << 10) // 2)
    return query + b'"a",' * (min(size, 99 << 10) // 8) + b'"a"]}'


def _keys(_random: random.Random, size: int) -> bytes:
    return b"{" + b",".join(b'"k%d":0' % i for i in range(size // 12)) + b"}"


def _nested_documents(_random: random.Random, size: int) -> bytes:
    return _filled('{"query":"q","documents":[{"text":"a","x":' + "[" * 400, "0,", "0" + "]" * 400 + "}]}", size)


def _pairs(_random: random.Random, size: int) -> bytes:
    texts = [f"q{i}" for i in range(min(size // 2000, 10_000))]
    return json.dumps({"queries": texts, "documents": texts}).encode()


def _at_the_bounds(_random: random.Random, size: int) -> bytes:
    """As many values as are allowed, each as large as one gets, and one character that makes all of a text wide."""
    objects = b'{"":0},' * min(240_000, size // 14)
    return b'{"query":"' + "😀".encode() + b"x" * (size - len(objects)) + b'","documents":[' + objects + b'"a"]}'


def _cut(random_: random.Random, size: int) -> bytes:
    whole = _document(random_, size)
    return whole[: random_.randrange(1, len(whole))]


def _flipped(random_: random.Random, size: int) -> bytes:
    body = bytearray(json.dumps({"query": "q", "documents": ["some text"] * (size // 12)}).encode())
    for _ in range(3):
        body[random_.randrange(len(body))] = random_.randrange(256)
    return bytes(body)


# Name -> (route, maker of a body of about `size` bytes).
KINDS: dict[str, tuple[str, Callable[[random.Random, int], bytes]]] = {
    "integers for documents": ("/rerank", _listed("documents", "1")),
    "integers for texts": ("/rerank", _listed("texts", "1")),
    "integers for sides": ("/score", lambda _, size: _filled('{"text_1":"q","text_2":[', "1,", "1]}", size)),
    "integers in a field that nothing reads": (
        "/v1/rerank",
        lambda _, size: _filled('{"query":"q","documents":["a"],"x":[', "1,", "1]}", size),
    ),
    "floats": ("/rerank", _listed("documents", "1e1")),
    "nulls": ("/v2/rerank", _listed("documents", "null")),
    "empty objects": ("/rerank", _listed("documents", "{}")),
    "small objects": ("/rerank", _listed("documents", '{"":0}')),
    "objects with text": ("/rerank", _listed("documents", '{"text":""}')),
    "empty lists": ("/rerank", _listed("documents", "[]")),
    "letters": ("/rerank", _listed("documents", '"a"')),
    "100,000 letters": ("/rerank", lambda r, size: _listed("documents", '"a"')(r, min(size, 400_000))),
    "many keys": ("/rerank", _keys),
    "one key again and again": ("/rerank", lambda _, size: _filled("{", '"query":"q",', '"documents":["a"]}', size)),
    "open brackets": ("/rerank", lambda _, size: b"[" * size),
    "open braces": ("/rerank", lambda _, size: b'{"a":' * (size // 5)),
    "closed brackets": ("/rerank", lambda _, size: b"[" * (size // 2) + b"]" * (size // 2)),
    "nested documents": ("/rerank", _nested_documents),
    "a long integer": ("/rerank", lambda _, size: _filled('{"query":"q","documents":["a"],"top_n":', "9", "}", size)),
    "a long float": ("/rerank", lambda _, size: _filled('{"query":"q","documents":["a"],"top_n":1.', "9", "}", size)),
    "no numbers": ("/rerank", _listed("documents", "NaN")),
    "commas in a text": ("/rerank", lambda _, size: _filled('{"query":"q","documents":["', ",[{", '"]}', size)),
    "a document of one thing": ("/rerank", _document),
    "a query of one thing": ("/rerank", _query),
    "a long query and many letters": ("/rerank", _query_and_letters),
    "a long name of a model": (
        "/rerank",
        lambda _, size: _filled('{"query":"q","documents":["a"],"model":"', "m", '"}', size),
    ),
    "a long field": (
        "/rerank",
        lambda _, size: _filled('{"query":"q","documents":[{"a":"b"}],"rank_fields":["', "m", '"]}', size),
    ),
    "as many queries as documents": ("/score", _pairs),
    "all bounds at once": ("/rerank", _at_the_bounds),
    "a body that is cut": ("/rerank", _cut),
    "a body with wrong bytes": ("/v1/rerank", _flipped),
    "UTF-16": ("/rerank", lambda _, size: ('{"query":"q","documents":["' + "x" * (size // 2) + '"]}').encode("utf-16")),
    "no JSON": ("/rerank", lambda _, size: b"x" * size),
}


def bodies(count: int, size: int, seed: int = 0, first: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """Yield `count` bodies as (kind, route, bytes): all kinds in turn from `first`, about `size` bytes at most."""
    random_ = random.Random(seed)
    names = list(KINDS)
    for i in range(first, first + count):
        name = names[i % len(names)]
        route, make = KINDS[name]
        most = size if i < len(names) else random_.choice((size, size, size // 3, size // 50))
        yield name, route, make(random_, most)[: size + 1000]
