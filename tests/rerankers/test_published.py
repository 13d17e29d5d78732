"""Published checkpoints as data: each file loads, its names are recognised and its template used; bad files say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.inputs.prompts import Template, list_templates
from fastrerank.rerankers import recognise
from fastrerank.rerankers.recognise import (
    Published,
    is_yes_no,
    method_of,
    published_checkpoints,
    read_published,
    recognised_template,
)
from fastrerank.rerankers.registry import METHODS

# Names on the hub of what the patterns stand for, in small letters.
NAMES = {
    "bge-gemma": ["bge-reranker-v2-gemma", "bge-reranker-v2-minicpm-layerwise"],
    "coderankllm": ["coderankllm"],
    "dear-listwise": ["dear-8b-reranker-listwise-lora-v1", "dear-3b-reranker-listwise"],
    "dear-stage1": ["dear-8b-reranker-ranknet-v1", "dear-3b-reranker-ce-v1"],
    "duot5": ["duot5-base-msmarco"],
    "erank": ["erank-4b", "erank-14b"],
    "first": ["first_model"],
    "first-rank_llm": ["first_mistral"],
    "grouprank": ["diver-grouprank-7b", "grouprank-32b"],
    "monot5": ["monot5-base-msmarco", "monot5-3b-msmarco-10k"],
    "mxbai-rerank-v2": ["mxbai-rerank-base-v2", "mxbai-rerank-large-v2"],
    "prorank": ["prorank-0.5b"],
    "qwen3-reranker": ["qwen3-reranker-0.6b", "qwen3-reranker-8b-seq-cls"],
    "rank-r1": ["rank-r1-7b-v0.1"],
    "rank_zephyr": ["rank_zephyr_7b_v1_full", "rank_vicuna_7b_v1"],
    "rankllama": ["rankllama-v1-7b-lora-passage"],
    "rankt5": ["rankt5-base"],
    "reasonrank": ["reasonrank-7b", "reasonrank-32b"],
}
FILES = sorted((Path(recognise.__file__).parent / "published").glob("*.toml"))
GOOD = 'methods = ["pointwise"]\ntemplate = "monot5"\nsource = "here"\n'


def checkpoint(folder: Path, name: str, **config: object) -> recognise.Checkpoint:
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return open_checkpoint(path)


def test_every_file_loads_and_says_what_is_known() -> None:
    published = published_checkpoints()
    assert [one.name for one in published] == [file.stem for file in FILES]
    for one in published:
        assert set(one.methods) <= METHODS.keys()
        assert one.template in list_templates(one.methods[0])
        assert bool(one.patterns) == (one.name in NAMES)


@pytest.mark.parametrize("one", published_checkpoints(), ids=lambda one: one.name)
def test_its_names_are_recognised_and_its_template_is_used(tmp_path: Path, one: Published) -> None:
    for name in [*one.names, *NAMES.get(one.name, [])]:
        assert [other.name for other in published_checkpoints() if other.matches(name)] == [one.name]
        found = checkpoint(tmp_path, name, architectures=["LlamaForCausalLM"])
        assert method_of(found) == one.methods[0]
        assert recognised_template(found, one.methods[0]) == one.template
        assert Template.load(one.template).kind == one.methods[0]
        assert is_yes_no(found, given=False) == ("cross-encoder" in one.methods)
        other = "listwise" if one.methods[0] == "pointwise" else "pointwise"
        assert recognised_template(found, other) is None
    for name in one.architectures:
        found = checkpoint(tmp_path, f"of-some-name-{name.lower()}", architectures=[name])
        assert (method_of(found), recognised_template(found, one.methods[0])) == (one.methods[0], one.template)


def test_other_names_are_not_recognised(tmp_path: Path) -> None:
    for name in ("my-qwen3-reranker", "mt5-base-mmarco-v2-mine", "llama-3.1-8b"):
        found = checkpoint(tmp_path, name, architectures=["LlamaForCausalLM"])
        assert method_of(found) is recognised_template(found, "pointwise") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names = [", r"new\.toml: not a readable TOML file"),
        (GOOD + 'names = ["x"]\nlabels = ["yes"]', r"new\.toml: labels is unknown; valid is one of architectures, .*"),
        (GOOD + 'names = "x"', r"new\.toml: names is 'x'; valid is a list of strings"),
        (GOOD.replace('"here"', "3") + 'names = ["x"]', r"new\.toml: source is 3; valid is a string"),
        (GOOD.replace('source = "here"', "") + 'names = ["x"]', r"new\.toml: source is missing"),
        (GOOD.replace('"pointwise"', "") + 'names = ["x"]', r"new\.toml: methods is empty"),
        (GOOD, r"new\.toml: names is missing; valid is names, patterns or architectures"),
        (GOOD + 'names = ["Owner/x"]', r"new\.toml: names holds 'Owner/x'; valid is names without the owner"),
        (GOOD + 'patterns = ["("]', r"new\.toml: patterns holds '\('"),
        (GOOD + 'names = ["known"]', r"new\.toml: names hold 'known'; valid is what first\.toml does not have"),
        (GOOD + 'names = ["kept-7b"]', r"new\.toml: names hold 'kept-7b'; valid is what first\.toml does not have"),
        (GOOD + 'patterns = ["know"]', r"new\.toml: names hold 'known'"),
        (GOOD + 'patterns = ["kept-[0-9]"]', r"new\.toml: names hold 'kept-\[0-9\]'"),
    ],
)
def test_bad_files_name_themselves(tmp_path: Path, text: str, message: str) -> None:
    first, new = tmp_path / "first.toml", tmp_path / "new.toml"
    first.write_text(GOOD + 'names = ["known"]\npatterns = ["kept-[0-9]"]')
    new.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_published([first, new])
