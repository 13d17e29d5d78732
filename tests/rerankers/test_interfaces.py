"""What each interface tells in its own words, and the names that it knows: `load`, commands, the server, Ray Serve."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_tiny import save_tiny_cross_encoder
from test_scores import LABELS, QUERY, TEXTS, save_with_labels

import fastrerank
from fastrerank.cli import main
from fastrerank.rerankers.options import load_keywords
from fastrerank.rerankers.refusal import OptionRefused
from fastrerank.runtime.naming import hub_id, model_name
from fastrerank.serve.batching.batcher import AsyncReranker


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_cross_encoder(tmp_path_factory.mktemp("one_label")))


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two labels whose names tell nothing."""
    return str(save_with_labels(tmp_path_factory.mktemp("silent"), ["LABEL_0", "LABEL_1"]))


@pytest.mark.parametrize("method", [None, "cross-encoder", "icr", "pointwise"])
def test_an_unknown_keyword_of_load_lists_those_that_there_are(checkpoint: str, method: str | None) -> None:
    with pytest.raises(TypeError) as caught:
        fastrerank.load(checkpoint, method=method, num_thread=2)
    message, known = str(caught.value), load_keywords(method or "cross-encoder")
    assert message.startswith("load() got an unexpected keyword argument 'num_thread' (did you mean 'num_threads'?)")
    assert f"method {method or 'cross-encoder'!r} takes {', '.join(known)}" in message
    assert "__init__" not in message


def test_keywords_of_other_releases_still_load(checkpoint: str) -> None:
    with pytest.warns(DeprecationWarning, match="default_activation_function"):
        model = fastrerank.load(checkpoint, device="cpu", default_activation_function="identity")
    assert model.activation_fn == "identity"  # type: ignore[attr-defined]
    assert fastrerank.load(checkpoint, device="cpu", backend="torch", model_kwargs={"dtype": "float32"}) is not None


def test_a_refusal_gives_the_advice_of_its_door(
    checkpoint: str, silent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fastrerank.load(silent, device="cpu")
    with pytest.raises(OptionRefused, match=r"do not tell which \('LABEL_0', 'LABEL_1'\): label= takes .* predict\(\)"):
        model.rank(QUERY, TEXTS)
    with pytest.raises(OptionRefused, match="prompt= puts a text before the query") as caught:
        fastrerank.load(checkpoint, device="cpu").check_options(instruction="rank")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    file = tmp_path / "documents.txt"
    file.write_text("\n".join(TEXTS))
    assert main(["rank", QUERY, str(file), "--model", silent, "--device=cpu"]) == 1
    told = capsys.readouterr().err
    assert "('LABEL_0', 'LABEL_1'): --label takes a name or a number" in told
    assert "predict" not in told
    assert "label=" not in told
    assert main(["rank", QUERY, str(file), "--model", silent, "--device=cpu", "--label", "LABEL_1"]) == 0

    pytest.importorskip("fastapi")
    assert main(["serve", "--model", silent, "--device=cpu"]) == 1
    told = capsys.readouterr().err
    assert "--label LABEL" in told
    assert "predict" not in told


def test_ray_serve_knows_aliases_and_labels_of_each_model(checkpoint: str, silent: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    from fastrerank.integrations.ray_serve import Arguments, Replica, app

    named = save_with_labels(tmp_path / "named", LABELS)
    made = Replica(
        Arguments(
            model=[f"two={silent}", f"three={named}", f"one={checkpoint}"],
            options={"device": "cpu"},
            alias=["rerank-v3.5=three"],
            label=["two=LABEL_1", "three=neutral"],
        ).model_dump(mode="json")
    )

    async def run() -> list[list[float]]:
        return [await made.score(QUERY, TEXTS, model=model) for model in (None, "two", "three", "rerank-v3.5", "one")]

    try:
        first, two, three, alias, one = asyncio.run(run())
        assert first == two == fastrerank.load(silent, device="cpu", label="LABEL_1").score(QUERY, TEXTS).tolist()
        assert three == alias == fastrerank.load(str(named), device="cpu", label=2).score(QUERY, TEXTS).tolist()
        assert one == fastrerank.load(checkpoint, device="cpu").score(QUERY, TEXTS).tolist()
        for unknown in ("four", ""):
            with pytest.raises(ValueError, match=r"model must be one of two, three, one, rerank-v3\.5, got"):
                asyncio.run(made.rank(QUERY, TEXTS, model=unknown))
    finally:
        for served in made.models.values():
            served.close()
    with pytest.raises(ValueError, match="for all models: give NAME=LABEL"):
        app(Arguments(model=checkpoint, label=["a", "b"]))


def test_one_property_says_what_is_a_logit(checkpoint: str) -> None:
    from fastrerank.rerankers.pointwise import PointwiseReranker
    from fastrerank.serve.api.info import tei_info

    class Numbers(PointwiseReranker):
        """A pointwise reranker of a template, without a model."""

        def __init__(self, score: str) -> None:
            self.template: Any = type("Template", (), {"score": score, "uses_instruction": False})()
            self.max_length, self.device, self.dtype = 512, "cpu", "float32"  # type: ignore[misc]

    for model, kind in (
        (fastrerank.load(checkpoint, device="cpu"), "logit"),
        (Numbers("expectation"), "raw"),
        (Numbers("difference"), "logit"),
    ):
        served = AsyncReranker(model)
        try:
            assert tei_info({"a": served}, {}, 10)["models"]["a"]["score"] == kind
        finally:
            served.close()
        assert model.raw_is_logit == (kind == "logit")


def test_mteb_names_a_model_as_everything_does(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--BAAI--bge-reranker" / "snapshots" / "953dc6f"
    assert hub_id(snapshot) == model_name(snapshot) == "BAAI/bge-reranker"
    assert hub_id(tmp_path / "other" / "snapshots" / "953dc6f") is None
    pytest.importorskip("mteb")
    from fastrerank.integrations.mteb import model_meta

    meta = model_meta(fastrerank.CrossEncoder(save_tiny_cross_encoder(snapshot), device="cpu"))
    assert (meta.name, meta.revision) == ("BAAI/bge-reranker", "953dc6f")
    own = save_tiny_cross_encoder(tmp_path / "snapshots" / "mine")
    meta = model_meta(fastrerank.CrossEncoder(own, device="cpu"))
    assert meta.name == "fastrerank/mine"
    assert meta.revision != "mine"


def test_eval_says_where_a_system_gets_its_label(
    silent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "q.jsonl"
    documents = [{"docid": str(i), "text": text, "rel": i} for i, text in enumerate(TEXTS)]
    data.write_text(json.dumps({"qid": "1", "query": QUERY, "candidates": documents}))
    for models, advice in (
        (["--model", silent], "--label takes a name or a number"),
        (["--model", f"a={silent}", "--model", f"b={silent}"], "label= is an option of the system (--label on the"),
    ):
        assert main(["eval", str(data), *models, "--device=cpu"]) == 1
        shown = capsys.readouterr()
        told = " ".join((shown.out + shown.err).split())
        assert advice in told
        assert "predict" not in told


def unfinished(folder: Path, system: Any) -> Callable[[], bool]:
    """Keep an outcome of this system; what is returned tells whether it would be used."""
    import numpy as np
    from judged import pool

    from fastrerank.evaluation.kept import Kept
    from fastrerank.evaluation.worker import Outcome

    kept = Kept(folder, {"a": pool(2)}, top_k=None, warmup=0)
    kept.write(system, Outcome({"a": ({}, np.zeros(2))}, 1.0, None, None))
    return lambda: kept.read(system) is not None


def test_what_was_kept_is_of_the_files_in_folders_and_those_that_options_name(tmp_path: Path) -> None:
    from fastrerank.evaluation import System

    model, template = save_tiny_cross_encoder(tmp_path / "model"), tmp_path / "mine.toml"
    (model / "1_Dense").mkdir()
    for path in (model / "1_Dense" / "model.safetensors", template):
        path.write_text("one")
        read = unfinished(tmp_path / "out", System("a", model=str(model), options={"template": str(template)}))
        assert read()
        path.write_text("another")
        assert not read()
        path.write_text("one")  # of the same size, later
        assert not read()


def test_what_was_kept_is_of_the_commit_that_a_hub_id_means(tmp_path: Path) -> None:
    from fastrerank.evaluation import System

    hub = tmp_path / "models--owner--name"
    (hub / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        save_tiny_cross_encoder(hub / "snapshots" / commit)
    (hub / "refs" / "main").write_text("a" * 40)
    options = {"cache_folder": str(tmp_path), "local_files_only": True}
    read = unfinished(tmp_path / "out", System("a", model="owner/name", options=options))
    assert read()
    (hub / "refs" / "main").write_text("b" * 40)
    assert not read()
