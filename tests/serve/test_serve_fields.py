"""Every field that clients send, on every route in every dialect: honoured, refused by name, or told as ignored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
import numpy as np
from helpers_tiny import save_tiny_cross_encoder
from serve_fakes import Explaining, Lengths, Optioned

from fastrerank import CrossEncoder
from fastrerank.inputs.limits import TextLimits
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.call import CallOptions
from fastrerank.serve.api.errors import Flavor, dialect
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker

QUERY = "abc"
DOCUMENTS = ["hello", "azzza", "by", "zaaaaaaa"]


@dataclass(frozen=True)
class Interface:
    """A route under a pinned dialect, and the name of its candidates: `texts`, `documents`, or the sides of pairs."""

    pinned: str
    path: str
    key: str

    @property
    def pairs(self) -> bool:
        return "score" in self.path

    def body(self, extra: dict[str, Any], documents: Any = DOCUMENTS) -> dict[str, Any]:
        query = {"text_1": QUERY} if self.pairs else {"query": QUERY}
        return query | {self.key: documents} | extra

    def flavor(self, body: dict[str, Any]) -> Flavor:
        return dialect(self.path, body.keys(), Flavor(self.pinned))


INTERFACES = [
    Interface("auto", "/rerank", "texts"),
    Interface("auto", "/", "texts"),
    Interface("auto", "/rerank", "documents"),
    Interface("auto", "/v1/rerank", "documents"),
    Interface("auto", "/v2/rerank", "documents"),
    Interface("auto", "/", "documents"),
    Interface("tei", "/rerank", "texts"),
    Interface("cohere", "/v1/rerank", "documents"),
    Interface("cohere", "/v2/rerank", "documents"),
    Interface("jina", "/v1/rerank", "documents"),
    Interface("vllm", "/rerank", "documents"),
    Interface("vllm", "/v2/rerank", "documents"),
    Interface("infinity", "/rerank", "documents"),
    Interface("sglang", "/v1/rerank", "documents"),
    Interface("voyage", "/v1/rerank", "documents"),
    Interface("auto", "/score", "text_2"),
    Interface("auto", "/v1/score", "text_2"),
    Interface("vllm", "/score", "text_2"),
    Interface("tei", "/v1/score", "text_2"),
]


def limits(**options: Any) -> CallOptions:
    return CallOptions(limits=TextLimits(**options))


@dataclass(frozen=True)
class Field:
    """A field with a valid value, what it does, and values that are refused.

    `call`: what the scores are computed with. `top`: how many results. `raw`: whether scores are raw. `least`: the
    lowest score that is returned. `carries`: whether results carry their documents. `refused`: the valid value is
    refused. `told`: it is accepted, and named in a header; `quiet`: it is accepted and changes nothing. `beside`:
    further fields of the request with the valid value. `rerank_only`: /score refuses it.
    """

    name: str
    valid: Any
    invalid: tuple[Any, ...] = (object,)
    call: CallOptions | None = None
    top: int | None = None
    raw: bool = False
    least: float | None = None
    carries: bool | None = None
    refused: bool = False
    told: bool = False
    quiet: bool = False
    beside: dict[str, Any] = field(default_factory=dict)
    rerank_only: bool = False


NOT_COUNTS = (-1, 1.5, "2", True, [2], {})
NOT_BOOLS = ("yes", 1, 0, [], {})
NOT_TEXTS = (1, True, [], {})
FIELDS = [
    Field("instruction", "hi", NOT_TEXTS, CallOptions(instruction="hi")),
    Field("instruct", "hi", NOT_TEXTS, CallOptions(instruction="hi")),
    Field("instruct", "hi", ("other",), CallOptions(instruction="hi"), beside={"instruction": "hi"}),
    Field(
        "chat_template_kwargs",
        {"instruction": "hi"},
        ({"enable_thinking": False}, {"instruction": 1}, {"tools": []}, "x", [], 1),
        CallOptions(instruction="hi"),
    ),
    Field(
        "chat_template_kwargs",
        {"instruct": "hi"},
        ({"instruct": "other"},),
        CallOptions(instruction="hi"),
        beside={"instruction": "hi"},
    ),
    Field("label", "yes", ("no such label", True, 1.5, [], {}), CallOptions(label="yes")),
    Field("label", 2, (3, -1), CallOptions(label=2)),
    Field("max_tokens_per_doc", 2, NOT_COUNTS, limits(max_tokens_per_doc=2)),
    Field("max_doc_length", 2, NOT_COUNTS, limits(max_tokens_per_doc=2)),
    Field("max_doc_length", 2, (3,), limits(max_tokens_per_doc=2), beside={"max_tokens_per_doc": 2}),
    Field("max_tokens_per_doc", 0, quiet=True),
    Field("max_tokens_per_query", 1, NOT_COUNTS, limits(max_tokens_per_query=1)),
    Field("max_query_length", 1, NOT_COUNTS, limits(max_tokens_per_query=1)),
    Field("max_tokens_per_query", 0, quiet=True),
    Field("truncate_prompt_tokens", 6, (0, -2, 41, 10**30, 1.5, "6", True), limits(max_length=6)),
    Field("truncate_prompt_tokens", -1, quiet=True),
    Field(
        "truncation_side",
        "left",
        ("Left", "middle", True, 1, []),
        limits(max_length=6, truncation_side="left"),
        beside={"truncate_prompt_tokens": 6},
    ),
    Field("truncation_side", "right", (), limits(max_length=6), beside={"truncate_prompt_tokens": 6}),
    Field(
        "truncation_direction",
        "Left",
        ("LEFT", "middle", True, 1, []),
        limits(max_length=6, truncation_side="left"),
        beside={"truncate_prompt_tokens": 6},
    ),
    Field(
        "truncation_direction",
        "left",
        ("right",),
        limits(max_length=6, truncation_side="left"),
        beside={"truncate_prompt_tokens": 6, "truncation_side": "left"},
    ),
    Field("truncate", True, ("none", "START", 1, 0, [], {}), quiet=True),
    Field("truncate", "END", quiet=True),
    Field("truncate", False, refused=True, beside={"truncate_prompt_tokens": 6}),
    Field("truncate", "NONE", refused=True, beside={"truncate_prompt_tokens": 6}),
    Field("truncate", False, (True,), quiet=True, beside={"truncation": False}),
    Field("truncation", True, NOT_BOOLS, quiet=True),
    Field("truncation", False, refused=True, beside={"truncate_prompt_tokens": 6}),
    Field("raw_scores", True, NOT_BOOLS, raw=True),
    Field("raw", True, NOT_BOOLS, raw=True),
    Field("use_activation", False, NOT_BOOLS, raw=True),
    Field("use_activation", False, (True,), raw=True, beside={"raw_scores": True}),
    Field("use_activation", True, quiet=True),
    Field("top_n", 2, NOT_COUNTS, top=2, rerank_only=True),
    Field("top_k", 2, NOT_COUNTS, top=2, rerank_only=True),
    Field("topN", 2, (1.5, "2", True, [2], {}), top=2, rerank_only=True),
    Field("topN", -1, quiet=True, rerank_only=True),
    Field("top_k", 2, (3,), top=2, beside={"top_n": 2}, rerank_only=True),
    Field("topN", 2, (3,), top=2, beside={"top_k": 2}, rerank_only=True),
    Field("score_threshold", 0.07, ("0.5", True, [], {}), least=0.07, rerank_only=True),
    Field("min_score", 0.07, ("0.5", True, [], {}), least=0.07, rerank_only=True),
    Field("min_score", 0.07, (0.1,), least=0.07, beside={"score_threshold": 0.07}, rerank_only=True),
    Field("threshold", 0.1, ("x", 0, False, [], {}), refused=True),
    Field("return_documents", True, NOT_BOOLS, carries=True, rerank_only=True),
    Field("return_text", True, NOT_BOOLS, carries=True, rerank_only=True),
    Field("return_text", False, (True,), carries=False, beside={"return_documents": False}),
    Field("return_documents", False, carries=False),
    Field("rank_fields", ["text"], ("text", [1], [], ["text", "absent"]), quiet=True, rerank_only=True),
    Field("explain", True, NOT_BOOLS, refused=True, rerank_only=True),
    Field("max_chunks_per_doc", 10, (1.5, "10", True, []), refused=True),
    Field("relevant_spans", {"mode": "enabled"}, ({}, "x", []), refused=True),
    Field("relevant_spans", {"mode": "disabled"}, quiet=True),
    Field("return_embeddings", True, NOT_BOOLS, refused=True),
    Field("return_embeddings", False, quiet=True),
    Field("priority", 3, (1.5, "3", True, [], 2**63), told=True),
    Field("priority", 0, quiet=True),
    Field("model", "fake", NOT_TEXTS, quiet=True),
    *(Field(name, "x", quiet=True) for name in ("user", "request_id", "cache_salt", "padding", "mm_processor_kwargs")),
    *(Field(name, 1, told=True) for name in ("normalize", "no_such_field", "input_type")),
]


def run(
    work: Callable[[Any], Awaitable[Any]], settings: Settings | None = None, models: dict[str, Reranker] | None = None
) -> Any:
    async def go() -> Any:
        shared = {name: AsyncReranker(one, max_wait_ms=0) for name, one in (models or {"fake": Optioned()}).items()}
        transport = httpx.ASGITransport(create_app(shared, settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            try:
                return await work(client)
            finally:
                for one in shared.values():
                    await one.aclose()

    return asyncio.run(go())


def post(path: str, body: Any, settings: Settings | None = None, models: dict[str, Reranker] | None = None) -> Any:
    return run(lambda client: client.post(path, json=body), settings, models)


def rows_of(answer: Any) -> list[tuple[int, float]]:
    """(index, score) of the results, in whatever dialect."""
    found = answer if isinstance(answer, list) else answer.get("results", answer.get("data"))
    return [(row["index"], row.get("relevance_score", row.get("score"))) for row in found]


def document_of(answer: Any) -> Any:
    """What the first result says of its document, None where it says nothing."""
    found = answer if isinstance(answer, list) else answer.get("results", answer.get("data"))
    found = found[0] if found else {"text": "no results"}
    return found.get("text", found.get("document"))


def expected_rows(interface: Interface, flavor: Flavor, known: Field) -> list[tuple[int, float]]:
    """What `known` makes of the request, computed without a server."""
    fake = Optioned()
    raw = [float(np.float32(fake.value(QUERY, text, known.call or CallOptions()))) for text in DOCUMENTS]
    shown = raw if known.raw or flavor is Flavor.vllm else [1 / (1 + np.exp(-value)) for value in raw]
    places = range(len(raw)) if interface.pairs else sorted(range(len(raw)), key=lambda i: -raw[i])
    rows = [(i, float(shown[i])) for i in places]
    if known.least is not None:
        rows = [row for row in rows if row[1] >= known.least]
    return rows[: known.top]


def check_refusal(flavor: Flavor, answer: Any, name: str, schema: bool, beside: Iterable[str] = ()) -> None:
    """The status and body with which a dialect refuses a field, and the field's name in it."""
    status = 400 if flavor in (Flavor.vllm, Flavor.voyage) else 422
    if name == "truncate_prompt_tokens" and not schema and flavor not in (Flavor.tei, Flavor.infinity):
        status = answer.status_code if answer.status_code in (400, status) else status
    assert answer.status_code == status, answer.text
    body, text = answer.json(), answer.text
    assert any(one in text for one in (name, *beside)), text
    if flavor is Flavor.tei:
        assert body.keys() == {"error", "error_type"}
        assert body["error_type"] == "Validation"
    elif flavor is Flavor.cohere:
        assert body.keys() == {"message"}
    elif flavor is Flavor.voyage:
        assert body.keys() == {"detail"}
        assert isinstance(body["detail"], str)
    elif flavor is Flavor.infinity:
        assert body.keys() == {"detail"}
        assert all(row.keys() == {"loc", "msg", "type"} and row["loc"][0] == "body" for row in body["detail"])
    elif flavor is Flavor.vllm:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["type"] == ("Bad Request" if schema else "BadRequestError")
        assert body["error"]["code"] == status
    else:
        error = body["error"]
        assert error["code"] == status
        assert flavor is not Flavor.auto or body.keys() == {"message", "error", "detail"}


@pytest.mark.parametrize(
    "interface", INTERFACES, ids=lambda interface: f"{interface.pinned}{interface.path}:{interface.key}"
)
def test_every_field_is_honoured_refused_or_told(interface: Interface) -> None:
    async def work(client: Any) -> None:
        async def ask(extra: dict[str, Any]) -> tuple[Flavor, Any]:
            body = interface.body(extra)
            return interface.flavor(body), await client.post(interface.path, json=body)

        _, plain = await ask({})
        assert plain.status_code == 200
        assert "x-ignored-fields" not in plain.headers
        for known in FIELDS:
            where = f"{interface} {known.name}={known.valid!r}"
            flavor, null = await ask({known.name: None})
            assert null.status_code == 200, (where, null.text)
            # A name that nobody knows is told whatever its value; all others are as if they were not there.
            unknown = known.told and known.name != "priority"
            assert ("x-ignored-fields" in null.headers) == unknown, where
            assert rows_of(null.json()) == rows_of(plain.json()), where

            flavor, answer = await ask({known.name: known.valid, **known.beside})
            # A side of a pair may not be told twice by `documents` and `texts`, nor a result of /rerank be asked for.
            if known.refused or (interface.pairs and known.rerank_only and known.valid is not False):
                # What /score has no place for is refused as it comes, whatever came beside it.
                check_refusal(flavor, answer, known.name, False, known.beside if known.rerank_only else ())
            else:
                assert answer.status_code == 200, (where, answer.text)
                check_answer(interface, flavor, known, answer, where)
            for value in () if known.invalid == (object,) else known.invalid:
                if interface.pairs and known.rerank_only and value in (0, False):
                    continue
                flavor, answer = await ask({**known.beside, known.name: value})
                assert answer.status_code in (400, 422), (where, value, answer.text)
                check_refusal(
                    flavor,
                    answer,
                    known.name,
                    _by_schema(answer),
                    known.beside if interface.pairs and known.rerank_only else (),
                )

    run(work, Settings(flavor=Flavor(interface.pinned)))


def _by_schema(answer: Any) -> bool:
    """vLLM's kind of error is the one that tells the schema's refusals."""
    error = answer.json().get("error")
    return isinstance(error, dict) and error.get("type") == "Bad Request"


def check_answer(interface: Interface, flavor: Flavor, known: Field, answer: Any, where: str) -> None:
    rows, wanted = rows_of(answer.json()), expected_rows(interface, flavor, known)
    assert [i for i, _ in rows] == [i for i, _ in wanted], where
    np.testing.assert_allclose([s for _, s in rows], [s for _, s in wanted], rtol=1e-6, err_msg=where)
    plain = expected_rows(interface, flavor, Field("", None))
    visible = known.call is not None or known.top is not None or known.least is not None
    if known.raw:
        visible = flavor is not Flavor.vllm  # the fake's own activation is none
    same = [i for i, _ in rows] == [i for i, _ in plain] and np.allclose([s for _, s in rows], [s for _, s in plain])
    assert same != visible, where
    assert ("x-ignored-fields" in answer.headers) == known.told, where
    if known.told:
        assert answer.headers["x-ignored-fields"] == known.name
    if not interface.pairs:
        returned = flavor in (Flavor.jina, Flavor.vllm, Flavor.sglang)
        assert (document_of(answer.json()) is not None) == (returned if known.carries is None else known.carries), where


def test_the_sweep_knows_every_field_of_the_schemas() -> None:
    from fastrerank.serve.api.schemas import Common, RerankBody

    own = {"query", "texts", "documents"}
    assert set(RerankBody.model_fields) - own <= {known.name for known in FIELDS}
    assert set(Common.model_fields) <= {known.name for known in FIELDS}


@pytest.mark.parametrize(
    ("flavor", "path", "zero"),
    [
        ("auto", "/v1/rerank", 200),
        ("tei", "/rerank", 200),
        ("vllm", "/rerank", 200),
        ("auto", "/v2/rerank", 422),
        ("cohere", "/v1/rerank", 422),
        ("jina", "/rerank", 422),
        ("infinity", "/rerank", 422),
        ("sglang", "/rerank", 422),
        ("voyage", "/rerank", 400),
    ],
)
def test_no_results_and_one_document(flavor: str, path: str, zero: int) -> None:
    pinned = Settings(flavor=Flavor(flavor))
    body = {"query": QUERY, "documents": DOCUMENTS}
    assert post(path, body | {"top_n": 0}, pinned).status_code == zero
    assert post(path, body | {"top_n": None, "topN": 0}, pinned).status_code == 200
    single = [post(path, body | {"documents": one}, pinned) for one in ("abc", {"text": "abc"})]
    parts = post(path, body | {"documents": {"content": [{"type": "text", "text": "abc"}]}}, pinned)
    takes = flavor == "vllm" or (flavor == "auto" and path == "/v1/rerank")
    for answer in (*single, parts):
        assert answer.status_code == (200 if takes else 400 if flavor == "voyage" else 422), answer.text
        assert ([i for i, _ in rows_of(answer.json())] == [0]) if takes else ("must be an array" in answer.text)
    both = post(path, body | {"texts": ["a"]}, pinned)
    assert both.status_code == (400 if flavor in ("vllm", "voyage") else 422)
    assert "either `documents` or `texts`" in both.text


def test_sides_that_come_twice_are_refused() -> None:
    answer = post("/score", {"text_1": "a", "text_2": "b", "queries": "a", "documents": "c"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text_1")


def test_instructions_where_no_prompt_has_a_place_for_them() -> None:
    """vLLM's dialect takes one without effect, and says so; all others refuse it."""
    body = {"query": QUERY, "documents": DOCUMENTS, "instruction": "hi"}
    refused = post("/v1/rerank", body, models={"fake": Lengths()})
    assert refused.status_code == 422
    assert "`instruction` cannot be honoured" in refused.json()["message"]
    told = post("/rerank", body, Settings(flavor=Flavor.vllm), {"fake": Lengths()})
    assert (told.status_code, told.headers["x-ignored-fields"]) == (200, "instruction")
    pairs = post(
        "/score",
        {"text_1": QUERY, "text_2": DOCUMENTS, "chat_template_kwargs": {"instruct": "x"}},
        models={"fake": Lengths()},
    )
    assert (pairs.status_code, pairs.headers["x-ignored-fields"]) == (200, "chat_template_kwargs.instruct")


@pytest.mark.parametrize(
    "extra",
    [
        {"label": "yes"},
        {"max_tokens_per_doc": 2},
        {"truncate_prompt_tokens": 9},
        {"truncation_side": "left"},
        {"truncate": False},
    ],
)
def test_what_a_method_cannot_honour_is_refused(extra: dict[str, Any]) -> None:
    for path in ("/v1/rerank", "/score"):
        body = {"query": QUERY, "documents": DOCUMENTS} if path == "/v1/rerank" else {"text_1": "q", "text_2": "d"}
        answer = post(path, body | extra, models={"fake": Lengths()})
        assert answer.status_code == (422 if path == "/v1/rerank" else 400)
        assert f"`{next(iter(extra))}` cannot be honoured" in answer.text
    right = {"query": QUERY, "texts": DOCUMENTS, "truncation_direction": "Right"}  # TEI's clients always say so
    assert post("/rerank", right, models={"fake": Lengths()}).status_code == 200


def test_long_texts_are_refused_in_vllms_dialect_unless_it_is_asked_to_cut() -> None:
    long = ["x" * 100, "a"]
    vllm = Settings(flavor=Flavor.vllm)
    for path, body in (("/rerank", {"query": QUERY, "documents": long}), ("/score", {"text_1": QUERY, "text_2": long})):
        refused = post(path, body, vllm)
        assert refused.status_code == 400, refused.text
        assert "the limit is 37" in refused.json()["error"]["message"]
        assert "`truncate_prompt_tokens`: -1" in refused.json()["error"]["message"]
        for cut in ({"truncate_prompt_tokens": -1}, {"truncate": True}, {"max_tokens_per_doc": 5}):
            assert post(path, body | cut, vllm).status_code == 200
        most = post(path, body | {"max_tokens_per_doc": 40}, vllm)
        assert (most.status_code, "less than the model's limit, 40" in most.text) == (400, True)
    assert post("/rerank", {"query": QUERY, "documents": long}).status_code == 200
    tei = post("/rerank", {"query": QUERY, "texts": long, "truncate": False})
    assert (tei.status_code, tei.json()["error_type"]) == (422, "Validation")
    assert post("/rerank", {"query": QUERY, "texts": long, "truncate": None}).status_code == 200


def test_cohere_cuts_documents_to_4096_tokens_where_the_model_has_more_room() -> None:
    def score(path: str, **extra: Any) -> float:
        roomy = Optioned()
        roomy.max_length = 10_000
        body = {"query": QUERY, "documents": ["a" * 5000], "raw_scores": True, **extra}
        return rows_of(post(path, body, models={"fake": roomy}).json())[0][1]

    assert score("/v2/rerank") == pytest.approx(4096 / 100 - 3)
    assert score("/v2/rerank", max_tokens_per_doc=0) == pytest.approx(50 - 3)
    assert score("/v2/rerank", max_tokens_per_doc=4500) == pytest.approx(45 - 3)
    assert score("/v1/rerank") == pytest.approx(50 - 3)


@pytest.mark.parametrize(
    ("flavor", "path", "own"),
    [
        ("auto", "/rerank", False),
        ("tei", "/rerank", False),
        ("cohere", "/v2/rerank", False),
        ("jina", "/rerank", False),
        ("infinity", "/rerank", False),
        ("sglang", "/rerank", False),
        ("voyage", "/rerank", False),
        ("vllm", "/rerank", True),
        ("auto", "/score", True),
        ("vllm", "/score", True),
    ],
)
def test_one_scale_per_dialect(flavor: str, path: str, own: bool) -> None:
    """vLLM shows what the checkpoint says that its scores are, the others a logit's sigmoid, all of them raw ones."""
    body = {"text_1": QUERY, "text_2": "hello"} if path == "/score" else {"query": QUERY, "documents": ["hello"]}
    raw = float(np.float32(Optioned().value(QUERY, "hello")))
    sigmoid = 1 / (1 + np.exp(-raw))
    for saved, activated in ((None, raw), (np.tanh, np.tanh(raw))):

        def ask(extra: dict[str, Any], saved: Any = saved) -> float:
            models: dict[str, Reranker] = {"fake": Optioned(saved=saved)}
            return rows_of(post(path, body | extra, Settings(flavor=Flavor(flavor)), models).json())[0][1]

        assert ask({}) == pytest.approx(activated if own else sigmoid, rel=1e-6)
        for extra in ({"raw_scores": True}, {"raw": True}, {"use_activation": False}):
            assert ask(extra) == pytest.approx(raw, rel=1e-6)


def test_thresholds_come_before_the_number_of_results() -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "raw_scores": True}
    everything = rows_of(post("/rerank", body).json())
    middle = everything[2][1]
    some = post("/rerank", body | {"score_threshold": middle, "top_n": 2}).json()
    assert rows_of(some) == everything[:2]
    assert rows_of(post("/rerank", body | {"min_score": middle}).json()) == everything[:3]
    assert rows_of(post("/rerank", body | {"min_score": everything[0][1] + 1}).json()) == []


def test_unknown_names_are_told_within_bounds() -> None:
    async def work(client: Any) -> tuple[Any, Any, str]:
        body: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
        odd = {"a b\r\nset-cookie: x": 1, "x" * 500: 3, "é": 4}
        first = await client.post("/rerank", json=body | odd)
        surrogate = json.dumps(body | {"\udcff": 2})
        refused = await client.post("/rerank", content=surrogate, headers={"content-type": "application/json"})
        assert refused.status_code == 422
        many = await client.post("/rerank", json=body | {f"field_{i}": i for i in range(1000)})
        return first, many, (await client.get("/metrics")).text

    first, many, metrics = run(work)
    assert first.status_code == many.status_code == 200
    told = first.headers["x-ignored-fields"]
    assert told.startswith("a%20b%0D%0Aset-cookie%3A%20x, xxx")
    assert told.endswith("%C3%A9")
    assert len(many.headers["x-ignored-fields"]) < 1200
    assert many.headers["x-ignored-fields"].endswith("field_15, and 984 more")
    lines = [line for line in metrics.splitlines() if line.startswith("fastrerank_ignored_fields_total")]
    assert len(lines) == 65
    assert 'fastrerank_ignored_fields_total{field="field_3"} 1.0' in lines
    assert sum(float(line.split()[-1]) for line in lines) == 1003


def test_priorities_and_unknown_names_are_told_of_refused_requests_too() -> None:
    answer = post("/rerank", {"query": QUERY, "documents": DOCUMENTS, "normalize": True, "threshold": 1})
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (422, "normalize")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny")))


class TestRealLimits:
    """A tiny model with a real tokenizer: the scores are those of the texts cut by hand."""

    @pytest.mark.parametrize(
        ("extra", "document"),
        [
            ({"max_tokens_per_doc": 3}, slice(0, 3)),
            ({"truncate_prompt_tokens": 3 + 2 + 4}, slice(0, 4)),
            ({"truncate_prompt_tokens": 3 + 2 + 4, "truncation_side": "left"}, slice(-4, None)),
            ({"max_tokens_per_doc": 3, "truncation_direction": "Left"}, slice(-3, None)),
        ],
    )
    def test_cut_texts(self, model: CrossEncoder, extra: dict[str, Any], document: slice) -> None:
        words = tiny_words(model)
        query, text = " ".join(words[:2]), words[2:12]
        by_hand = model.score(query, [" ".join(text[document])])
        whole = model.score(query, [" ".join(text)])
        assert by_hand[0] != whole[0]
        for path in ("/v1/rerank", "/score"):
            body: dict[str, Any] = {"query": query, "documents": [" ".join(text)]}
            if path == "/score":
                body = {"text_1": query, "text_2": " ".join(text)}
            answer = post(path, body | extra | {"raw_scores": True}, models={"tiny": model})
            assert answer.status_code == 200, answer.text
            assert np.float32(rows_of(answer.json())[0][1]) == by_hand[0]

    def test_queries_and_refusals(self, model: CrossEncoder) -> None:
        words = tiny_words(model)
        query, text = " ".join(words[:4]), " ".join(words[2:6])
        body = {"query": query, "texts": [text], "raw_scores": True}
        short = post("/rerank", body | {"max_tokens_per_query": 2}, models={"tiny": model})
        assert np.float32(short.json()[0]["score"]) == model.score(" ".join(words[:2]), [text])[0]
        assert int(short.headers["x-compute-tokens"]) == 3 + 2 + 4
        refused = post("/rerank", body | {"truncate": False, "truncate_prompt_tokens": 9}, models={"tiny": model})
        assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
        assert "the limit is 2" in refused.json()["error"]


def test_limits_below_what_a_pair_needs_are_refused(model: CrossEncoder) -> None:
    body = {"query": "a", "documents": ["b"]}
    for length in (1, 2, 3):
        answer = post("/v1/rerank", body | {"truncate_prompt_tokens": length}, models={"tiny": model})
        assert answer.status_code in (200, 422), answer.text
        assert answer.status_code == 200 or "max_length" in answer.json()["message"]
    assert post("/v1/rerank", body | {"truncate_prompt_tokens": 1}, models={"tiny": model}).status_code == 422


def tiny_words(model: CrossEncoder) -> list[str]:
    """Words of the model's vocabulary, each of one token."""
    vocabulary = model.tokenizer.get_vocab()
    return sorted(word for word in vocabulary if word.isalpha() and len(word) > 1)[:12]


def test_explained_results_in_voyages_dialect() -> None:
    answer = post(
        "/v1/rerank",
        {"query": "q", "documents": ["a bb"], "explain": True},
        Settings(flavor=Flavor.voyage),
        {"icr": Explaining()},
    )
    assert answer.json()["data"][0]["tokens"] == [["a", 1.0], [" bb", 2.0]]
