"""docs/reference/scores.md: each interface of its table has its scale, and asks early which label ranks."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_tiny import save_tiny_cross_encoder
from safetensors.numpy import load_file, save_file

import fastrerank
from fastrerank.cli import main
from fastrerank.data.datasets import Candidate, JudgedQuery
from fastrerank.evaluation import compare, evaluate
from fastrerank.rerankers.activations import sigmoid
from fastrerank.serve.batching.batcher import AsyncReranker

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
QUERY, TEXTS = "how long do fleas live", ["a flea", "the cats sleep all day", "fleas live up to a year", "day"]
LABELS = ["contradiction", "entailment", "neutral"]
CPU = {"device": "cpu"}

Call = Callable[[], Sequence[float]]  # the scores of TEXTS for QUERY, in their order
# Called with a checkpoint, whether the other scale is wanted, and optionally label=.
Interface = Callable[..., Call]


def save_with_labels(folder: Path, names: Sequence[str]) -> Path:
    """A tiny cross-encoder whose head has these labels; each ranks TEXTS in another way."""
    save_tiny_cross_encoder(folder)
    weights = load_file(folder / "model.safetensors")
    random = np.random.default_rng(5)
    shape = (len(names), weights["classifier.weight"].shape[1])
    weights["classifier.weight"] = random.normal(0, 1, shape).astype(np.float32)
    weights["classifier.bias"] = random.normal(0, 1, len(names)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_cross_encoder(tmp_path_factory.mktemp("one_label")))


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three labels, of which one has a name that tells it."""
    return str(save_with_labels(tmp_path_factory.mktemp("telling"), LABELS))


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two labels whose names tell nothing."""
    return str(save_with_labels(tmp_path_factory.mktemp("silent"), ["LABEL_0", "LABEL_1"]))


def by_position(hits: Sequence[dict[str, Any]]) -> list[float]:
    """Scores of ranked rows in the order of TEXTS."""
    return [hit["score"] for hit in sorted(hits, key=lambda hit: hit["corpus_id"])]


def by_text(found: Sequence[tuple[str, float]]) -> list[float]:
    return [dict(found)[text] for text in TEXTS]


def scored(path: str, other: bool, **label: Any) -> Call:
    model = fastrerank.load(path, **CPU)
    return lambda: model.activated(model.score(QUERY, TEXTS, **label)) if other else model.score(QUERY, TEXTS, **label)


def ranked(path: str, other: bool, **label: Any) -> Call:
    model = fastrerank.load(path, **CPU)
    return lambda: by_position(model.rank(QUERY, TEXTS, raw=other, **label))


def predicted(path: str, other: bool, **label: Any) -> Call:
    model, function = fastrerank.CrossEncoder(path, **CPU), {"activation_fn": "identity"} if other else {}
    return lambda: model.predict([(QUERY, text) for text in TEXTS], **function, **label)


def shared(path: str, other: bool, **label: Any) -> Call:
    async def run() -> Any:
        async with AsyncReranker(fastrerank.load(path, **CPU)) as model:
            submitted = await asyncio.wrap_future(model.submit(QUERY, TEXTS, **label))
            scores = await model.score(QUERY, TEXTS, **label)
            assert np.array_equal(scores, submitted)
            return model.reranker.activated(scores) if other else scores

    return lambda: asyncio.run(run())


def shared_rank(path: str, other: bool, **label: Any) -> Call:
    async def run() -> Any:
        async with AsyncReranker(fastrerank.load(path, **CPU)) as model:
            return by_position(await model.rank(QUERY, TEXTS, raw=other, **label))

    return lambda: asyncio.run(run())


def langchain(path: str, other: bool, **label: Any) -> Call:
    documents = pytest.importorskip("langchain_core.documents")
    from fastrerank.integrations.langchain import FastReranker

    made = FastReranker(model=path, options=CPU, top_n=None, raw=other, **label)
    given = [documents.Document(page_content=text) for text in TEXTS]

    def call() -> list[float]:
        once = by_text([(d.page_content, d.metadata["relevance_score"]) for d in made.compress_documents(given, QUERY)])
        found = asyncio.run(made.acompress_documents(given, QUERY))
        assert once == by_text([(d.page_content, d.metadata["relevance_score"]) for d in found])
        return once

    return call


def langchain_pairs(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("langchain_core")
    from fastrerank.integrations.langchain import FastRerankCrossEncoder

    made = FastRerankCrossEncoder(path, **CPU, raw=other, **label)
    return lambda: made.score([(QUERY, text) for text in TEXTS])


def llama_index(path: str, other: bool, **label: Any) -> Call:
    schema = pytest.importorskip("llama_index.core.schema")
    from fastrerank.integrations.llama_index import FastRerank

    made = FastRerank(path, top_n=len(TEXTS), **CPU, raw=other, **label)
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text)) for text in TEXTS]

    def call() -> list[float]:
        once = by_text([(node.text, node.score) for node in made.postprocess_nodes(nodes, query_str=QUERY)])
        found = asyncio.run(made.apostprocess_nodes(nodes, query_str=QUERY))
        assert once == by_text([(node.text, node.score) for node in found])
        return once

    return call


def haystack(path: str, other: bool, **label: Any) -> Call:
    module = pytest.importorskip("haystack")
    from fastrerank.integrations.haystack import FastRanker

    made = FastRanker(path, options=CPU, raw=other, **label)
    made.warm_up()
    documents = [module.Document(content=text) for text in TEXTS]

    def call() -> list[float]:
        found = made.run(query=QUERY, documents=documents)["documents"]
        scaled = made.run(query=QUERY, documents=documents, scale_score=not other)["documents"]
        assert [d.score for d in found] == [d.score for d in scaled]
        return by_text([(document.content, document.score) for document in found])

    return call


def rerankers(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("rerankers.documents")
    from fastrerank.integrations.rerankers import FastRanker

    made = FastRanker(path, **CPU, raw=other, **label)

    def call() -> list[float]:
        found = by_text([(result.text, result.score) for result in made.rank(QUERY, TEXTS)])
        assert found == [made.score(QUERY, text) for text in TEXTS]
        return found

    return call


def replica(kind: str) -> Interface:
    def interface(path: str, other: bool, **label: Any) -> Call:
        pytest.importorskip("ray.serve")
        from fastrerank.integrations.ray_serve import Replica

        made = Replica({"model": path, "options": CPU, **label})

        async def run() -> Any:
            if kind == "rank":
                return by_position(await made.rank(QUERY, TEXTS, raw=other))
            return by_position(await made.rank(QUERY, TEXTS)) if other else await made.score(QUERY, TEXTS)

        return lambda: asyncio.run(run())

    return interface


def pyterrier(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("pyterrier")
    import pandas as pd

    from fastrerank.integrations.pyterrier import FastReRanker

    made = FastReRanker(path, **CPU, raw=not other, **label)
    frame = pd.DataFrame({"qid": "1", "query": QUERY, "docno": list("abcd"), "text": TEXTS, "score": 0.0, "rank": 0})
    return lambda: made(frame)["score"].tolist()


def beir(path: str, other: bool, **label: Any) -> Call:
    from fastrerank.integrations.beir import FastReranker

    made = FastReranker(path, **CPU, raw=not other, **label)
    return lambda: made.predict([[QUERY, text] for text in TEXTS])


MTEB = {
    "inputs1": [{"text": [QUERY] * 3}, {"text": [QUERY]}],
    "inputs2": [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}],
    "task_metadata": None,
    "hf_split": "test",
    "hf_subset": "default",
    "batch_size": 2,
}


def mteb(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("mteb")
    from fastrerank.integrations.mteb import FastReranker

    made = FastReranker(path, **CPU, raw=not other, **label)
    return lambda: made.predict(**MTEB)


def mteb_alone(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("mteb")
    from fastrerank.integrations.mteb import FastReranker

    model = fastrerank.CrossEncoder(path, **CPU, **label)
    model.check_options()
    return lambda: FastReranker(model, raw=False).predict(**MTEB) if other else model.predict(**MTEB)


def ray(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("ray.data")
    from fastrerank.integrations.ray import PairScorer

    made = PairScorer(path, **CPU, raw=not other, **label)
    return lambda: made({"query": np.array([QUERY] * len(TEXTS)), "document": np.array(TEXTS)})["score"].tolist()


def flag_embedding(path: str, other: bool, **label: Any) -> Call:
    from fastrerank.integrations.flag_embedding import FlagReranker

    made = FlagReranker(path, devices="cpu", normalize=other, **label)
    return lambda: made.compute_score([(QUERY, text) for text in TEXTS])


def judged() -> list[JudgedQuery]:
    return [JudgedQuery("1", QUERY, [Candidate(text, text) for text in TEXTS], {TEXTS[0]: 1})]


def evaluated(path: str, _other: bool, **label: Any) -> Call:
    pytest.importorskip("ir_measures")
    model = fastrerank.CrossEncoder(path, **CPU, **label)

    def call() -> list[float]:
        run = evaluate(model, judged()).run["1"]
        comparison = compare({"ours": model}, judged())
        assert comparison.results["dataset"]["ours"].run["1"] == run
        return by_text(run)

    return call


def index(path: str, _other: bool, **label: Any) -> Call:
    model = fastrerank.CrossEncoder(path, **CPU, **label)
    made = fastrerank.CURIndex.build(model, TEXTS, [QUERY], progress=False)

    def call() -> list[float]:
        ids, scores = made.search_reranker(model, QUERY, k=len(TEXTS))
        assert dict(zip(ids.tolist(), scores.tolist(), strict=True)) == dict(enumerate(made.vectors()[0].tolist()))
        return [float(score) for score in made.vectors()[0]]

    return call


def on_label(label: dict[str, Any]) -> list[str]:
    return [f"--label={value}" for value in label.values()]


def command(*arguments: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(list(arguments))
    if code:
        raise ValueError(out.getvalue())
    return out.getvalue()


def rank_command(path: str, other: bool, **label: Any) -> Call:
    file = Path(path) / "texts.txt"
    file.write_text("\n".join(TEXTS))
    arguments = ["rank", QUERY, str(file), "--model", path, "--device=cpu", "--json", *on_label(label)]
    return lambda: by_position(json.loads(command(*arguments, *(["--raw"] if other else []))))


def score_command(path: str, other: bool, **label: Any) -> Call:
    pytest.importorskip("ray.data")
    from fastrerank.integrations import ray as module

    found: list[float] = []

    def score_files(inputs: str, _output: str, model: str, method: str | None, **given: Any) -> dict[str, int]:
        options = {name: given[name] for name in ("label", "raw", "device")}
        made = module.PairScorer(model, method, **options)
        found.extend(made.scores([QUERY] * len(TEXTS), TEXTS).tolist())
        return {"rows": len(inputs)}

    def call() -> list[float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "score_files", score_files)
            more = ["--activated"] if other else []
            command("score", "in", "out", "--model", path, "--device=cpu", *more, *on_label(label))
        return found

    return call


def eval_command(path: str, _other: bool, **label: Any) -> Call:
    pytest.importorskip("ir_measures")
    data, run = Path(path) / "judged.jsonl", Path(path) / "run.trec"
    documents = [{"docid": f"d{i}", "text": text, "rel": int(i == 0)} for i, text in enumerate(TEXTS)]
    data.write_text(json.dumps({"qid": "1", "query": QUERY, "candidates": documents}))

    def call() -> list[float]:
        command("eval", str(data), "--model", path, "--device=cpu", "--json", f"--run={run}", *on_label(label))
        lines = [line.split() for line in run.read_text().splitlines()]
        return by_text([(TEXTS[int(line[2][1:])], float(line[4])) for line in lines])

    return call


def http(flavor: str) -> Interface:
    def interface(path: str, other: bool, **label: Any) -> Call:
        pytest.importorskip("fastapi")
        httpx = pytest.importorskip("httpx")
        from fastrerank.serve.api.errors import Flavor
        from fastrerank.serve.app import Settings, create_app

        raw = {} if not other else ({"use_activation": False} if flavor == "vllm" else {"raw_scores": True})

        async def run() -> Any:
            async with AsyncReranker(fastrerank.CrossEncoder(path, **CPU, **label)) as model:
                app = create_app({"ours": model}, Settings(flavor=Flavor(flavor)))
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    answer = (await client.post("/rerank", json={"query": QUERY, "documents": TEXTS, **raw})).json()
            rows = sorted(answer["results"], key=lambda row: row["index"])
            return [row["relevance_score"] for row in rows]

        return lambda: asyncio.run(run())

    return interface


INTERFACES: dict[str, Interface] = {
    "Reranker.score, score_many": scored,
    "Reranker.rank": ranked,
    "CrossEncoder.predict": predicted,
    "AsyncReranker.score, submit": shared,
    "AsyncReranker.rank": shared_rank,
    "langchain.FastReranker": langchain,
    "langchain.FastRerankCrossEncoder": langchain_pairs,
    "llama_index.FastRerank": llama_index,
    "haystack.FastRanker": haystack,
    "rerankers.FastRanker, rank and score": rerankers,
    "ray_serve.Replica.rank of handles": replica("rank"),
    "ray_serve.Replica.score of handles": replica("score"),
    "pyterrier.FastReRanker": pyterrier,
    "beir.FastReranker": beir,
    "mteb.FastReranker": mteb,
    "mteb.evaluate on a CrossEncoder itself": mteb_alone,
    "ray.PairScorer, ray.score_files": ray,
    "flag_embedding.FlagReranker": flag_embedding,
    "evaluation.evaluate, compare and their runs": evaluated,
    "CURIndex.build, search_reranker": index,
    "fastrerank rank": rank_command,
    "fastrerank score": score_command,
    "fastrerank eval and its runs": eval_command,
    "HTTP of TEI, Cohere, Jina, Infinity and auto": http("auto"),
    "HTTP vLLM, with --api-flavor vllm": http("vllm"),
}

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "scores.md"
TABLE = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in re.findall(r"^\| `.*$", PAGE.read_text("utf-8"), re.MULTILINE)
]
ROWS = [(interface.replace("`", ""), scale.split(",")[0], bool(other)) for interface, scale, other in TABLE]


def expected(path: str, scale: str, **label: Any) -> np.ndarray:
    """Raw scores, or their sigmoid; of the label the log-odds, written out."""
    model = fastrerank.CrossEncoder(path, **CPU)
    logits = model.predict([(QUERY, text) for text in TEXTS], activation_fn="identity").astype(np.float64)
    if logits.ndim == 1:
        raw = logits
    else:
        column = LABELS.index(label.get("label", "entailment"))
        others = np.exp(np.delete(logits, column, axis=1)).sum(axis=1)
        raw = logits[:, column] - np.log(others)
    return raw if scale == "raw" else 1 / (1 + np.exp(-raw))


def close(ours: Sequence[float], wanted: np.ndarray) -> bool:
    return len(ours) == len(wanted) and bool(np.abs(np.asarray(ours, np.float64) - wanted).max() <= 1e-5)


def test_the_table_lists_every_door() -> None:
    assert [interface for interface, _, _ in ROWS] == list(INTERFACES)
    assert {scale for _, scale, _ in ROWS} == {"raw", "activated"}


@pytest.mark.parametrize(("interface", "scale", "other"), ROWS, ids=[row[0] for row in ROWS])
def test_each_door_has_its_scale(interface: str, scale: str, other: bool, checkpoint: str) -> None:
    assert not close(expected(checkpoint, "raw"), expected(checkpoint, "activated"))
    assert close(INTERFACES[interface](checkpoint, False)(), expected(checkpoint, scale))
    if other:
        opposite = "activated" if scale == "raw" else "raw"
        assert close(INTERFACES[interface](checkpoint, True)(), expected(checkpoint, opposite))


LABELLED = [(interface, scale) for interface, scale, _ in ROWS if not interface.startswith(("CrossEncoder.predict",))]


@pytest.mark.parametrize(("interface", "scale"), LABELLED, ids=[row[0] for row in LABELLED])
def test_each_door_ranks_by_the_label(interface: str, scale: str, telling: str) -> None:
    assert close(INTERFACES[interface](telling, False)(), expected(telling, scale))
    assert close(INTERFACES[interface](telling, False, label="neutral")(), expected(telling, scale, label="neutral"))


# The library's own classes serve predict() without a label, so they ask for it in the call.
ADAPTERS = [row[0] for row in ROWS if "." in row[0].split(",")[0] and row[0][0].islower()] + [
    "CURIndex.build, search_reranker"
]


@pytest.mark.parametrize("interface", [interface for interface in ADAPTERS if not interface.startswith("evaluation")])
def test_an_adapter_asks_for_the_label_when_it_is_made(interface: str, silent: str) -> None:
    with pytest.raises(ValueError, match="LABEL_0', 'LABEL_1"):
        INTERFACES[interface](silent, False)
    INTERFACES[interface](silent, False, label=1)()
    INTERFACES[interface](silent, False, label="LABEL_0")()


@pytest.mark.parametrize("interface", [row[0] for row in ROWS if row[0].startswith("fastrerank")])
def test_a_command_asks_for_the_label(interface: str, silent: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        INTERFACES[interface](silent, False)()
    assert "'LABEL_0', 'LABEL_1'" in capfd.readouterr().err.replace("\n", " ")
    INTERFACES[interface](silent, False, label=1)()


def test_langchains_own_reranker_sorts_by_the_label(telling: str) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers.document_compressors")
    documents = pytest.importorskip("langchain_core.documents")
    from fastrerank.integrations.langchain import FastRerankCrossEncoder

    given = [documents.Document(page_content=text) for text in TEXTS]
    orders = set()
    for label in LABELS:
        wanted = np.argsort(-expected(telling, "raw", label=label), kind="stable")
        model = FastRerankCrossEncoder(telling, **CPU, label=label)
        kept = retrievers.CrossEncoderReranker(model=model, top_n=4).compress_documents(given, QUERY)
        assert [document.page_content for document in kept] == [TEXTS[i] for i in wanted]
        orders.add(tuple(wanted))
    assert len(orders) > 1


def test_an_index_belongs_to_one_label(telling: str, tmp_path: Path) -> None:
    neutral, entailment = (fastrerank.CrossEncoder(telling, **CPU, label=label) for label in (2, 1))
    index = fastrerank.CURIndex.build(neutral, TEXTS, [QUERY], checkpoint=tmp_path / "build", progress=False)
    with pytest.raises(ValueError, match=r"label 2.*label 1"):
        index.search_reranker(entailment, QUERY, k=1)
    with pytest.raises(ValueError, match="scorer differs"):
        fastrerank.CURIndex.build(entailment, TEXTS, [QUERY], checkpoint=tmp_path / "build", progress=False)


def test_a_saved_activation_is_shown_and_haystack_scales_on_request(checkpoint: str, tmp_path: Path) -> None:
    """MS MARCO's MiniLMs save Identity: activated scores are the logits; Haystack's scale_score asks for a sigmoid."""
    module = pytest.importorskip("haystack")
    from fastrerank.integrations.haystack import FastRanker

    folder = save_tiny_cross_encoder(tmp_path / "identity")
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.0"}
    (folder / "config.json").write_text(json.dumps(config))
    raw = expected(checkpoint, "raw")
    documents = [module.Document(content=text) for text in TEXTS]
    found = {}
    for scale in (None, True, False):
        ranker = FastRanker(str(folder), options=CPU, scale_score=scale)
        given = ranker.run(query=QUERY, documents=documents)["documents"]
        found[scale] = by_text([(document.content, document.score) for document in given])
    assert close(found[None], raw)
    assert close(found[False], raw)
    assert close(found[True], sigmoid(raw))
    assert close(INTERFACES["langchain.FastReranker"](str(folder), False)(), raw)


def test_what_a_loaded_reranker_cannot_take_is_refused(checkpoint: str) -> None:
    from fastrerank.integrations.beir import FastReranker

    model = fastrerank.load(checkpoint, **CPU)
    with pytest.raises(ValueError, match="method, max_length cannot change a loaded reranker"):
        FastReranker(model, method="cross-encoder", max_length=8)
    with pytest.raises(ValueError, match="label must be one of 0"):
        FastReranker(model, label="relevant")
