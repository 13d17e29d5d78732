"""What tells the scorers of two indexes apart: every word of a template, and nothing of how objects are shown."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fastrerank.inputs.prompts import Template
from fastrerank.search.build import identity, same_scorer

TEMPLATE = Template.load("qwen3-reranker")
TEXT = Template(name="own", kind="pointwise", source="here", labels=("yes", "no"), text="{query} {document}:")


def of(template: Template) -> dict[str, Any]:
    return identity(SimpleNamespace(template=template))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("true", "false")},
        {"suffix": "?"},
        {"instruction": "Find owls."},
        {"document": "<{document}>"},
        {"chat_options": {"enable_thinking": True}},
    ],
)
def test_an_edited_template_of_the_same_name_is_another_scorer(changes: dict[str, Any]) -> None:
    for template in (TEMPLATE, TEXT):
        edited = replace(template, **changes)
        assert of(edited) != of(template)
        with pytest.raises(ValueError, match="the index was built with the scores of"):
            same_scorer(of(template), SimpleNamespace(template=edited))
        same_scorer(of(edited), SimpleNamespace(template=replace(edited)))


def test_limits_of_written_answers_do_not_matter() -> None:
    assert of(replace(TEXT, max_new_tokens=100, stop=("</answer>",), algorithm="groups")) == of(TEXT)


def test_saved_indexes_stay_valid() -> None:
    written = (
        "Template(name='own', kind='pointwise', source='here', paper='', notice='', readout='logits', model='causal', "
        "score='', labels=('yes', 'no'), identifiers='', most_documents=None, identifier_label='{identifier}', "
        "messages=(), text='{query} {document}:', segments=(), pair=(), suffix='', generation_suffix='', decoder='', "
        "instruction='', instruction_format='{instruction}', document='{document}', separator='', order='given', "
        "document_limit=None, document_unit='', max_length=None, preprocess=(), preprocess_query=(), "
        "system_joiner=None, special_tokens='auto', content='text', requires=(), chat_options=mappingproxy({}))"
    )
    assert of(TEXT)["template"] == hashlib.sha256(written.encode()).hexdigest()[:16]
    found = identity(SimpleNamespace(instruction="Find owls."))["instruction"]
    assert found == hashlib.sha256(b"'Find owls.'").hexdigest()[:16]
