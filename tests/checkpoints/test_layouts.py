"""Multi-vector layouts: refused by name by every method and by `load`'s search, never loaded as something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import tiny as factory
import torch

import fastrerank
from fastrerank import EmbeddingReranker, LateInteractionReranker

STANFORD, PYLATE = "Stanford's ColBERT", "PyLate"
MULTI_VECTOR = "a MultiVectorEncoder of sentence-transformers"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def modules(folder: Path, *types: str) -> None:
    entries = [{"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_M", "type": t} for i, t in enumerate(types)]
    write(folder / "modules.json", entries)


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | changes)


ST = "sentence_transformers.models.Transformer"


def stanford(folder: Path) -> None:
    set_config(folder, architectures=["HF_ColBERT"])
    write(folder / "artifact.metadata", {"dim": 128, "query_maxlen": 32})


def stanford_by_its_metadata_beside_stale_modules(folder: Path) -> None:
    write(folder / "artifact.metadata", {"dim": 128})
    modules(folder, ST)


def pylate(folder: Path) -> None:
    modules(folder, ST, "pylate.models.Dense.Dense")
    write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "ColBERT",
            "query_prefix": "[Q] ",
            "document_prefix": "[D] ",
            "query_length": 32,
        },
    )


def pylate_without_markers(folder: Path) -> None:
    modules(folder, ST, "pylate.models.Dense.Dense", "pylate.models.Dense.Dense")
    write(folder / "config_sentence_transformers.json", {"query_prefix": "", "do_query_expansion": False})


def pylate_by_its_settings(folder: Path) -> None:
    modules(folder, ST, "sentence_transformers.models.Dense")
    write(folder / "config_sentence_transformers.json", {"do_query_expansion": True})


def multi_vector(folder: Path) -> None:
    base = "sentence_transformers.base.modules"
    modules(
        folder,
        f"{base}.transformer.Transformer",
        f"{base}.dense.Dense",
        "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        f"{base}.normalize.Normalize",
    )
    write(folder / "config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"})


def multi_vector_by_its_mask(folder: Path) -> None:
    modules(folder, ST, "any.where.MultiVectorMask")


def multi_vector_by_its_similarity(folder: Path) -> None:
    modules(folder, ST)
    write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "meanmaxsim"})


def multi_vector_by_its_expansion(folder: Path) -> None:
    modules(folder, ST)
    write(folder / "sentence_bert_config.json", {"query_length": 32, "query_expansion": {"strategy": "fixed"}})


LAYOUTS: list[tuple[Callable[[Path], None], str]] = [
    (stanford, STANFORD),
    (stanford_by_its_metadata_beside_stale_modules, STANFORD),
    (pylate, PYLATE),
    (pylate_without_markers, PYLATE),
    (pylate_by_its_settings, PYLATE),
    (multi_vector, MULTI_VECTOR),
    (multi_vector_by_its_mask, MULTI_VECTOR),
    (multi_vector_by_its_similarity, MULTI_VECTOR),
    (multi_vector_by_its_expansion, MULTI_VECTOR),
]


@pytest.mark.parametrize(("make", "layout"), LAYOUTS)
def test_every_method_refuses_a_marked_layout_by_name(
    tmp_path: Path, make: Callable[[Path], None], layout: str
) -> None:
    folder = factory.save(tmp_path / "model", "bert")
    make(folder)
    for method in (None, *fastrerank.list_methods()):
        with pytest.raises(ValueError, match=f"in the layout of {layout} .*Serve it with .*MultiVector") as caught:
            fastrerank.load(str(folder), method=method)
        assert str(folder) in str(caught.value)
        assert "method=" not in str(caught.value)  # no advice that would load it as something else


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("kind", [LateInteractionReranker, EmbeddingReranker, fastrerank.CrossEncoder])
def test_a_projection_beside_the_body_is_told_without_any_other_mark(tmp_path: Path, engine: str, kind: Any) -> None:
    folder = factory.save(tmp_path, "bert", change=lambda tensors: tensors | {"linear.weight": torch.ones(8, 40)})
    with pytest.raises(ValueError, match=r"'linear\.weight' beside the body: a ColBERT checkpoint in Stanford"):
        kind(folder, engine=engine)


def test_an_embedding_model_with_usual_settings_is_not_marked(tmp_path: Path) -> None:
    folder = factory.save(tmp_path, "bert")
    modules(folder, ST, "sentence_transformers.models.Pooling")
    write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "prompts": {"query": "q: "},
        },
    )
    write(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    assert fastrerank.load(str(folder)).method == "embedding"


def test_the_projection_of_token_vectors_is_refused_by_late_interaction_alone(tmp_path: Path) -> None:
    folder = factory.save(tmp_path, "bert")
    (folder / "colbert_linear.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds colbert_linear\.pt.*method='embedding' serves"):
        LateInteractionReranker(folder)
    assert fastrerank.load(folder, method="cross-encoder").score("owl?", ["the owl"]).shape == (1,)
