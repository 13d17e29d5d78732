"""The server against clients that other people wrote: Cohere's SDK, LiteLLM's providers, LangChain, LlamaIndex."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
from serve_fakes import Lengths
from serve_running import running

from fastrerank.serve.api.errors import Flavor
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker

DOCUMENTS = ["a", "cccc", "bbb"]
BEST = [(1, 0.8807970779778823), (2, 0.7310585786300049)]


def start(flavor: Flavor) -> Iterator[str]:
    with running(create_app({"fake": AsyncReranker(Lengths())}, Settings(keys=("key",), flavor=flavor))) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from start(Flavor.auto)


@pytest.fixture(scope="module")
def infinity_url() -> Iterator[str]:
    yield from start(Flavor.infinity)


@pytest.mark.parametrize("version", ["Client", "ClientV2"])
def test_cohere(url: str, version: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = getattr(cohere, version)(api_key="key", base_url=url)
    answer = client.rerank(query="qq", documents=DOCUMENTS, model="fake", top_n=2)
    assert [(row.index, row.relevance_score) for row in answer.results] == BEST
    assert answer.meta.tokens.input_tokens == 3
    with pytest.raises(cohere.NotFoundError):
        client.rerank(query="qq", documents=DOCUMENTS, model="other")
    with pytest.raises(cohere.UnauthorizedError):
        getattr(cohere, version)(api_key="wrong", base_url=url).rerank(query="q", documents=["a"], model="fake")


def test_cohere_v1_documents(url: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.Client(api_key="key", base_url=url)
    rows = client.rerank(
        query="qq", documents=[{"text": "abc", "kept": "x"}], model="fake", return_documents=True
    ).results
    assert (rows[0].document.text, rows[0].document.kept) == ("abc", "x")


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm", "huggingface", "infinity", "voyage"])
def test_litellm(url: str, infinity_url: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet when it is imported
    litellm = pytest.importorskip("litellm")
    base = infinity_url if provider == "infinity" else url
    answer = litellm.rerank(
        model=f"{provider}/fake",
        query="qq",
        documents=DOCUMENTS,
        top_n=2,
        api_key="key",
        api_base=base,
        return_documents=True,
    )
    assert [(row["index"], row["relevance_score"]) for row in answer.results] == BEST
    assert [row["document"]["text"] for row in answer.results] == ["cccc", "bbb"]


def test_langchain(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Jina compressor, whose address is a constant of its module."""
    module = pytest.importorskip("langchain_community.document_compressors.jina_rerank")
    monkeypatch.setattr(module, "JINA_API_URL", f"{url}/v1/rerank")
    compressor = module.JinaRerank(jina_api_key="key", model="fake", top_n=2)
    documents = [module.Document(page_content=text, metadata={"at": at}) for at, text in enumerate(DOCUMENTS)]
    found = compressor.compress_documents(documents, "qq")
    assert [(each.metadata["at"], each.metadata["relevance_score"]) for each in found] == BEST


def test_llama_index(url: str) -> None:
    """Its postprocessor for TEI."""
    tei = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    rerank = tei.TextEmbeddingInference(base_url=url, model_name="fake", top_n=2, auth_token="Bearer key")
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]
    found = rerank.postprocess_nodes(nodes, QueryBundle(query_str="qq"))
    assert [(DOCUMENTS.index(each.node.get_content()), each.score) for each in found] == BEST


def test_voyage(url: str) -> None:
    voyage = pytest.importorskip("voyageai")
    client = voyage.Client(api_key="key", base_url=f"{url}/v1")
    answer = client.rerank("qq", DOCUMENTS, model="fake", top_k=2)
    assert [(row.index, row.relevance_score) for row in answer.results] == BEST
    assert [row.document for row in answer.results] == ["cccc", "bbb"]
    assert answer.total_tokens == 3
    with pytest.raises(voyage.error.InvalidRequestError, match="top_k"):
        client.rerank("qq", DOCUMENTS, model="fake", top_k=-1)
    with pytest.raises(voyage.error.AuthenticationError):
        voyage.Client(api_key="wrong", base_url=f"{url}/v1").rerank("q", ["a"], model="fake")


def test_infinity_lists_models(url: str) -> None:
    """The client that is generated from Infinity's schema."""
    models = pytest.importorskip("infinity_client.models")
    httpx = pytest.importorskip("httpx")
    answer = httpx.get(f"{url}/models", headers={"authorization": "Bearer key"}).json()
    (row,) = models.OpenAIModelInfo.from_dict(answer).data
    assert (row.id, row.stats["batch_size"], row.capabilities) == ("fake", 16384, ["rerank"])
