"""A pytest plugin: `sentence_transformers.CrossEncoder` is fastrerank's, and models of the hub are tiny local ones.

`PEER_FOLDER` is where tiny checkpoints are made; `PEER_SKIPS` is a JSON list of [regular expression of a test, reason].
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import tiny
from sentence_transformers import cross_encoder

import fastrerank

FOLDER = Path(os.environ["PEER_FOLDER"])
# Model of the hub -> family, labels and config.json's additions of the tiny checkpoint in its place.
TANH = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}
OLD_TANH = {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "cross-encoder/stsb-distilroberta-base": ("roberta", 1, {}),
    "cross-encoder/nli-MiniLM2-L6-H768": ("roberta", 3, {}),
    "cross-encoder-testing/reranker-bert-tiny-gooaq-bce": ("bert", 1, {}),
    "cross-encoder-testing/reranker-bert-tiny-gooaq-bce-STv54": ("bert", 1, {}),
    "cross-encoder-testing/reranker-bert-tiny-gooaq-bce-tanh-v3": ("bert", 1, OLD_TANH),
    "cross-encoder-testing/reranker-bert-tiny-gooaq-bce-tanh-v4": ("bert", 1, TANH),
}


def local(name: Any) -> Any:
    """The folder of the tiny checkpoint for a model of the hub; every other name as it is."""
    if str(name) not in MODELS:
        return name
    family, labels, additions = MODELS[str(name)]
    folder = FOLDER / str(name).replace("/", "--")
    if not folder.exists():
        tiny.save(folder, family, labels=labels)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | additions))
    return folder


class CrossEncoder(fastrerank.CrossEncoder):
    """fastrerank's, with local checkpoints."""

    def __init__(self, model_name_or_path: Any = None, *legacy: Any, **options: Any) -> None:
        options.pop("revision", None)
        super().__init__(local(model_name_or_path), *legacy, **options)


# When this is imported, as pytest reads conftest.py files before it calls plugins.
for module in (sentence_transformers, cross_encoder):
    module.CrossEncoder = CrossEncoder  # type: ignore[misc]
if "PEER_UTILS" in os.environ:  # helpers that source distributions leave out of their tests
    package, utils = types.ModuleType("tests"), types.ModuleType("tests.utils")
    utils.SafeTemporaryDirectory = tempfile.TemporaryDirectory  # type: ignore[attr-defined]
    sys.modules.update({"tests": package, "tests.utils": utils})


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: a mark of sentence-transformers' tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in json.loads(os.environ["PEER_SKIPS"]):
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
                break


@pytest.fixture
def distilroberta_base_ce_model() -> None:
    """Stands in for a fixture of a conftest.py that source distributions leave out; only tests that train use it."""
