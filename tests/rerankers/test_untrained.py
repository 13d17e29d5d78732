"""Methods by vectors warn once where the checkpoint's files tell that it was trained as something else."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import decoders
import tiny as factory

import fastrerank
from fastrerank import EmbeddingReranker, LateInteractionReranker

CLASSES = (LateInteractionReranker, EmbeddingReranker)


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = call()
        model.rank("owl", ["cat", "old cat"])
        model.rank("owl", ["cat"])
    return [one for one in found if one.category is UserWarning]


def set_architectures(folder: Path, *names: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": list(names)}))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_classifier(tmp_path: Path, kind: Any) -> None:
    path = factory.save(tmp_path, "bert")
    for call in (lambda: kind(path), lambda: fastrerank.load(str(path), method=kind.method)):
        (one,) = warned(call)
        assert one.filename == __file__
        message = str(one.message)
        assert message.startswith(f"{path} was trained as a classifier (BertForSequenceClassification), not for ")
        assert kind.method in message
        assert message.endswith("method='cross-encoder' is what it was trained for")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_language_model_without_pooling(tmp_path: Path, kind: Any) -> None:
    model = decoders.build("llama", vocab_size=factory.VOCABULARY)
    model.save_pretrained(tmp_path)
    factory.save_tokenizer(tmp_path, "bert")
    (one,) = warned(lambda: kind(tmp_path))
    assert f"was trained as a language model (LlamaForCausalLM), not for {kind.method}: " in str(one.message)
    assert "cross-encoder" not in str(one.message)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("name", "said"), [("BertForMaskedLM", True), ("BertForPreTraining", True), ("BertModel", False), (None, False)]
)
def test_by_what_the_config_names(tmp_path: Path, kind: Any, name: str | None, said: bool) -> None:
    path = factory.save(tmp_path, "bert")
    set_architectures(path, *([name] if name else []))
    found = warned(lambda: kind(path))
    assert len(found) == said
    if said:
        assert f"a model of masked words ({name})" in str(found[0].message)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_embedding_model_is_not_warned_of(minilm: Path, kind: Any) -> None:
    assert warned(lambda: kind(minilm)) == []


def test_modules_tell_more_than_the_architecture(tmp_path: Path) -> None:
    path = factory.save(tmp_path, "bert")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    assert warned(lambda: EmbeddingReranker(path)) == []
