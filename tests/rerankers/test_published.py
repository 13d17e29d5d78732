"""Published checkpoints: every file is right, its names find it, and what it says replaces the template's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastrerank.inputs.prompts import Template, list_templates
from fastrerank.rerankers import published
from fastrerank.rerankers.published import find_published, read_published

FILES = sorted((Path(published.__file__).with_suffix("")).glob("*.toml"))
# A checkpoint of each file by the name it was published under.
NAMES = {
    "bge-reranker-v2-gemma": "bge-reranker-v2-gemma",
    "bge-reranker-v2-minicpm-layerwise": "bge-reranker-v2-minicpm-layerwise",
    "coderankllm": "coderankllm",
    "dear-listwise": "dear-8b-reranker-listwise-v1",
    "dear-stage1": "dear-3b-reranker-ranknet-v1",
    "duot5": "duot5-base-msmarco",
    "erank": "erank-4b",
    "first": "first_model",
    "first-mistral": "first_mistral",
    "grouprank": "diver-grouprank-7b",
    "inranker": "inranker-3b",
    "monoptt5": "monoptt5-base",
    "monot5": "monot5-3b-msmarco",
    "monot5-blank": "mt5-13b-mmarco-100k",
    "monot5-sim": "ptt5-base-pt-msmarco-100k-v2",
    "monot5-yes": "mt5-base-mmarco-v2",
    "mxbai-rerank-v2": "mxbai-rerank-large-v2",
    "prorank": "prorank-0.5b",
    "qwen3-reranker": "qwen3-reranker-0.6b",
    "rank-r1": "rank-r1-7b-v0.1",
    "rank_zephyr": "rank_vicuna_7b_v1",
    "rankllama": "rankllama-v1-7b-lora-passage",
    "rankt5": "rankt5-large",
    "reasonrank": "reasonrank-32b",
}
GOOD = 'names = ["x"]\nmethod = "pointwise"\ntemplate = "monot5"\nsource = "a page"\n'


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_is_found_by_its_names_alone(path: Path) -> None:
    one = read_published(path)
    found = find_published([NAMES[path.stem]], [])
    assert found == one
    assert one.template.name in list_templates(one.method)
    assert find_published(["another-model", NAMES[path.stem]], []) == one


def test_the_longest_match_decides_and_other_names_are_nobodys() -> None:
    assert len(NAMES) == len(FILES)
    listwise = find_published(["dear-8b-reranker-listwise"], [])
    assert listwise is not None
    assert listwise.method == "listwise"
    assert find_published(["inranker-small-mine", "bge-reranker-v2-m3"], []) is None
    layerwise = find_published(["mine"], ["LayerWiseMiniCPMForCausalLM"])
    assert layerwise is not None
    assert layerwise.file == "bge-reranker-v2-minicpm-layerwise"


def test_what_a_checkpoint_has_otherwise_replaces_the_templates(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + 'labels = ["ja", "nein"]\nmax_length = 99\n')
    template = read_published(path).template
    assert (template.labels, template.max_length) == (("ja", "nein"), 99)
    assert template.text == Template.load("monot5").text
    path.write_text(GOOD)
    assert read_published(path).template == Template.load("monot5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "size = 3\n", "size is unknown; valid is one of architectures, instruction, labels"),
        (GOOD.replace("names", "nam"), "nam is unknown"),
        (GOOD.replace('source = "a page"\n', ""), "source is missing"),
        (GOOD.replace('["x"]', '"x"'), "names is 'x'; valid is a list of strings"),
        (GOOD.replace('"x"', '"X"'), "names holds 'X'; valid are names in small letters"),
        (GOOD.replace('"x"', '"("'), "names holds '(', which is no pattern"),
        (GOOD.replace("pointwise", "listwise"), "template 'monot5' is pointwise, and method is 'listwise'"),
        (GOOD.replace("monot5", "monot6"), "unknown template 'monot6'"),
        (GOOD + "max_length = 0\n", "max_length is 0; valid is an integer of at least 1"),
        (GOOD + "max_length = true\n", "max_length is True; valid is an integer of at least 1"),
        (GOOD + "scores_pairs = 1\n", "scores_pairs is 1; valid is true or false"),
        ("names = [", "not a readable TOML file"),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_published(path)
