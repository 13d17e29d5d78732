"""Models of a server: their names and aliases, labels of heads with several, and what is said of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
import numpy as np
from serve_fakes import Explaining, Lengths, Optioned
from typer.testing import CliRunner

import fastrerank
from fastrerank import CrossEncoder
from fastrerank.cli import app as command
from fastrerank.rerankers.base import Reranker
from fastrerank.serve.api.errors import Flavor
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker
from fastrerank.serve.names import hub_names, parse_aliases, parse_labels

BODY = {"query": "q", "documents": ["a", "bb"]}


def request(method: str, path: str, models: dict[str, Reranker], settings: Settings | None = None, **body: Any) -> Any:
    async def run() -> Any:
        shared = {name: AsyncReranker(one, max_wait_ms=0) for name, one in models.items()}
        try:
            transport = httpx.ASGITransport(create_app(shared, settings), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, json=body or None)
        finally:
            for one in shared.values():
                await one.aclose()

    return asyncio.run(run())


def test_aliases() -> None:
    settings = Settings(aliases={"rerank-v3.5": "second", "BAAI/second": "second"})
    two: dict[str, Reranker] = {"first": Lengths(), "second": Lengths()}
    for name, served in (("rerank-v3.5", "second"), ("BAAI/second", "second"), ("second", "second"), (None, "first")):
        assert request("POST", "/v1/rerank", two, settings, model=name, **BODY).json()["model"] == served
    unknown = request("POST", "/v1/rerank", two, settings, model="third", **BODY)
    assert unknown.status_code == 404
    assert "one of first, second, rerank-v3.5, BAAI/second" in unknown.json()["message"]
    listed = request("GET", "/v1/models", two, settings).json()["data"]
    assert [row["aliases"] for row in listed] == [[], ["rerank-v3.5", "BAAI/second"]]
    for aliases in ({"x": "third"}, {"first": "second"}):
        with pytest.raises(ValueError, match=r"aliases must map other names to first, second, got"):
            request("GET", "/info", two, Settings(aliases=aliases))


def test_names_of_the_hub(tmp_path: Path) -> None:
    assert hub_names({"small": "cross-encoder/ms-marco-MiniLM-L6-v2"}) == {
        "cross-encoder/ms-marco-MiniLM-L6-v2": "small",
        "ms-marco-MiniLM-L6-v2": "small",
    }
    assert hub_names({"bge-reranker-base": "BAAI/bge-reranker-base"}) == {"BAAI/bge-reranker-base": "bge-reranker-base"}
    assert hub_names({"a": "x/m", "b": "y/m"}) == {"x/m": "a", "y/m": "b"}  # m could be either
    assert hub_names({"m": "x/m", "b": "y/m"}) == {"x/m": "m", "y/m": "b"}  # m is the first's own name
    assert hub_names({"a": "x/m", "b": "x/m"}) == {}
    assert hub_names({"a": str(tmp_path), "b": "folder"}) == {}


def test_aliases_of_the_command_line() -> None:
    assert parse_aliases(["a=m", "b=n", "c=d=m"], ["m", "n"]) == {"a": "m", "b": "n", "c=d": "m"}
    for wrong, message in (
        (["a"], "must be ALIAS=NAME"),
        (["=m"], "must be ALIAS=NAME"),
        (["a="], "must be ALIAS=NAME"),
        (["a=x"], "no model is named 'x'; one of m, n"),
        (["m=n"], "'m' is the name of another model"),
        (["a=m", "a=n"], "'a' is the name of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_aliases(wrong, ["m", "n"])


def test_labels_of_the_command_line() -> None:
    assert parse_labels([], ["m"]) == {}
    assert parse_labels(["1"], ["m", "n"]) == {"m": 1, "n": 1}
    assert parse_labels(["m=entailment", "2"], ["m", "n"]) == {"m": "entailment", "n": 2}
    assert parse_labels(["a=b"], ["m"]) == {"m": "a=b"}  # a label may hold the sign
    for wrong, message in (
        (["m="], "LABEL or NAME=LABEL"),
        ([""], "LABEL or NAME=LABEL"),
        (["1", "2"], "for all models"),
        (["m=1", "m=2"], "has the label 1 already"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_labels(wrong, ["m", "n"])


def test_several_labels_need_one_that_ranks(tiny: Any) -> None:
    folder = tiny("bert", labels=3)
    with pytest.raises(ValueError, match=r"model 'nli' cannot be served as it is: .*LABEL_1.*--label nli=LABEL"):
        request("GET", "/info", {"nli": CrossEncoder(folder)})
    model = CrossEncoder(folder, label=1)
    query, texts = "the owl", ["a cat", "mice at night"]
    for extra, label in (({}, 1), ({"label": "LABEL_2"}, 2), ({"label": 0}, 0)):
        answer = request("POST", "/score", {"nli": model}, text_1=query, text_2=texts, **extra).json()["data"]
        probabilities = model.predict([(query, text) for text in texts], apply_softmax=True)[:, label]
        np.testing.assert_allclose([row["score"] for row in answer], probabilities, rtol=1e-5)
        ranked = request("POST", "/v2/rerank", {"nli": model}, query=query, documents=texts, **extra).json()["results"]
        assert [row["relevance_score"] for row in ranked] == pytest.approx(sorted(probabilities)[::-1], rel=1e-5)
    refused = request("POST", "/v1/rerank", {"nli": model}, label="LABEL_3", **BODY)
    assert refused.status_code == 422
    assert "`label` cannot be honoured: label must be one of 0 ('LABEL_0')" in refused.json()["message"]
    kind = request("GET", "/info", {"nli": model}).json()["model_type"]["reranker"]
    assert kind["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_the_command_refuses_a_model_without_a_label_and_passes_one_on(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrerank.serve import run as running

    served: list[Any] = []
    monkeypatch.setattr(running, "serve", lambda application, *_, **__: served.append(application.state.server))
    folder = tiny("bert", labels=3)
    refused = CliRunner().invoke(command, ["serve", "--model", f"nli={folder}"])
    assert refused.exit_code != 0
    assert served == []
    told = f"{refused.output} {refused.exception}"
    assert "--label nli=LABEL" in told
    options = ["--label", "nli=LABEL_2", "--alias", "other=nli"]
    result = CliRunner().invoke(command, ["serve", "--model", f"nli={folder}", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    (server,) = served
    assert server.models["nli"].reranker.label == 2
    assert server.settings.aliases == {"other": "nli"}
    for one in server.models.values():
        one.close()


def test_info_has_the_fields_that_tei_requires() -> None:
    info = request("GET", "/info", {"fake": Optioned(), "icr": Explaining()}, Settings(max_documents=7)).json()
    kinds = {
        "model_id": str,
        "model_dtype": str,
        "model_type": dict,
        "max_concurrent_requests": int,
        "max_input_length": int,
        "max_batch_tokens": int,
        "max_client_batch_size": int,
        "auto_truncate": bool,
        "tokenization_workers": int,
        "version": str,
    }
    for name, kind in kinds.items():
        assert type(info[name]) is kind, name
    assert {"model_sha", "max_batch_requests", "sha", "docker_label"} <= info.keys()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("fake", 40, 7)
    assert (info["version"], info["tokenization_workers"]) == (fastrerank.__version__, 2)
    assert info["model_type"] == {
        "reranker": {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    }
    assert "label" in info["models"]["fake"]["options"]
    assert info["models"]["icr"]["options"] == []
    # A model without a limit has a number there too.
    assert type(request("GET", "/info", {"icr": Explaining()}).json()["max_input_length"]) is int


def test_infinitys_models_have_stats() -> None:
    rows = request("GET", "/models", {"a": Lengths(), "b": Lengths()}).json()
    assert rows["object"] == "list"
    assert [row["id"] for row in rows["data"]] == ["a", "b"]
    row = rows["data"][0]
    assert row["stats"] == {"queue_fraction": 0.0, "queue_absolute": 0, "results_pending": 0, "batch_size": 16384}
    assert (
        row.items()
        >= {"object": "model", "owned_by": "infinity", "backend": "fastrerank", "capabilities": ["rerank"]}.items()
    )
    assert isinstance(row["created"], int)


def test_headers_of_tei() -> None:
    answer = request("POST", "/rerank", {"fake": Lengths()}, query="q", texts=["a", "bb"])
    times = [f"x-{name}-time" for name in ("compute", "total", "tokenization", "queue", "inference")]
    assert all(answer.headers[name].isdigit() for name in times)
    assert (answer.headers["x-compute-type"], answer.headers["x-compute-characters"]) == ("cpu", "5")
    assert answer.headers["x-compute-tokens"] == "2"


@pytest.mark.parametrize(
    ("flavor", "path", "version"),
    [
        ("auto", "/v1/rerank", "1"),
        ("cohere", "/v1/rerank", "1"),
        ("auto", "/v2/rerank", "2"),
        ("cohere", "/v2/rerank", "2"),
        ("cohere", "/rerank", "2"),
    ],
)
def test_coheres_meta(flavor: str, path: str, version: str) -> None:
    pinned = Settings(flavor=Flavor(flavor))
    answer = request("POST", path, {"fake": Lengths()}, pinned, return_documents=True, **BODY).json()
    assert answer["meta"]["api_version"] == {"version": version}
    assert answer["results"][0]["document"] == {"text": "bb"}
    if flavor == "cohere":
        assert answer.keys() == {"id", "results", "meta"}


def test_voyages_answer_is_read_by_clients_of_other_dialects_too() -> None:
    answer = request("POST", "/v1/rerank", {"fake": Lengths()}, top_k=1, return_documents=True, **BODY).json()
    assert answer["object"] == "list"
    assert [(row["index"], row["document"]) for row in answer["data"]] == [(1, "bb")]
    assert [(row["index"], row["document"]) for row in answer["results"]] == [(1, {"text": "bb"})]
    assert answer["usage"]["total_tokens"] == 2
    bare = request("POST", "/v1/rerank", {"fake": Lengths()}, top_k=None, truncation=True, **BODY).json()
    assert bare["data"][0].keys() == {"index", "relevance_score"}


def test_an_instruction_reaches_the_prompt(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from test_pointwise import save

    from fastrerank.rerankers.pointwise import PointwiseReranker

    model, texts = PointwiseReranker(save(tmp_path / "Qwen3-Reranker-tiny")), ["the owl", "a cat"]
    expected = model.score("who", texts, instruction="find the owl")
    assert not np.array_equal(expected, model.score("who", texts))
    body = {"text_1": "who", "text_2": texts, "instruct": "find the owl", "raw_scores": True}
    answer = request("POST", "/score", {"qwen": model}, **body)
    np.testing.assert_allclose([row["score"] for row in answer.json()["data"]], expected, rtol=2e-5)


def test_info_lists_what_the_checkpoint_honours_and_refusals_speak_of_fields(tmp_path: Path) -> None:
    """A head whose tokenizer joins the pairs has no place for an instruction, whatever its class can do."""
    from helpers_tiny import save_tiny_cross_encoder

    from fastrerank import CrossEncoder

    model = CrossEncoder(save_tiny_cross_encoder(tmp_path), device="cpu")
    assert model.honoured_options == model.call_options - {"instruction"}
    options = request("GET", "/info", {"plain": model}).json()["models"]["plain"]["options"]
    assert options == sorted(model.honoured_options)
    with pytest.raises(ValueError, match="prompt= puts a text before the query"):  # Python's advice, for its callers
        model.score("who", ["the owl"], instruction="find")
    refused = request("POST", "/rerank", {"plain": model}, query="who", texts=["the owl"], instruction="find")
    assert refused.status_code == 422
    message = refused.json()["error"]
    assert message.startswith("`instruction` cannot be honoured: this model's method is 'cross-encoder', and its input")
    assert "leave it out (/info: it takes label, " in message
    assert not any(word in message for word in ("prompt=", "predict", "()", "load"))
    for option in sorted(model.honoured_options - {"label"}):
        value = {"truncation_side": "left", "truncate": False}.get(option, 12)
        model.check_options(**{option: value})
