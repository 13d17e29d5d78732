"""Prompts of the methods that read attention: the whole prompt's ids, spans by places, no text searched or parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import prompt_tokenizers
import pytest

from fastrerank.inputs.prompts import attention_policy
from fastrerank.inputs.prompts.attention_policy import Policy, layout_of, parse_heads, read_preset, write_preset
from fastrerank.inputs.prompts.attention_prompts import AttentionPrompts

TYPES = {
    "qwen": "qwen2",
    "llama3": "llama",
    "llama2": "llama",
    "mistral": "mistral",
    "gemma": "gemma2",
    "phi3": "phi3",
    "zephyr": "mistral",
    "gpt2": "gpt2",
}
LAYOUTS = {
    "qwen": "qwen2.5",
    "llama3": "llama-3",
    "mistral": "mistral",
    "gpt2": "plain",
}
DOCUMENTS = ["The owl sleeps.", "", "7 mice [3] {x}\n\n", "Café 東京. ends.", " padded ", "The owl sleeps."]
QUERIES = ["what is {0} a owl?", "", " N/A ", "[2]\n\nQuery: 7"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {style: prompt_tokenizers.STYLES[style]() for style in TYPES}


def prompts(tokenizers: dict[str, Any], style: str, preset: str, **options: Any) -> AttentionPrompts:
    policy = Policy.load(preset)
    given = {"instruction": policy.instructions["ie"], "words": None} | options
    return AttentionPrompts(tokenizers[style], policy, model_type=TYPES[style], **given)


def expected_spans(found: AttentionPrompts, query: str, documents: list[str]) -> tuple[list[int], list[set[int]]]:
    """The ids of the whole prompt by the checkpoint's tokenizer, and the tokens that hold a document's characters."""
    text = found.whole_text(query, documents)
    encoding = found._whole.encode(text, add_special_tokens=found.layout.bos)
    order = documents[::-1] if found.policy.order == "reversed" else documents
    spans = []
    place = len(found.layout.prefix) + len(" Here are some paragraphs:")
    for number, document in enumerate(order, start=1):
        place += len(found.layout.separator)
        label = len(found.policy.label.format(number=number))
        start = place if found.policy.label_in_span else place + label
        place += label + 1 + len(document)
        tokens = {i for i, (a, b) in enumerate(encoding.offsets) if b > start and a < place and b > a}
        spans.append(tokens)
    return encoding.ids, spans[::-1] if found.policy.order == "reversed" else spans


@pytest.mark.parametrize("preset", ["icr", "qrhead", "core"])
@pytest.mark.parametrize("style", TYPES)
def test_ids_and_spans_are_those_of_the_whole_prompt(tokenizers: Any, style: str, preset: str) -> None:
    found = prompts(tokenizers, style, preset)
    assert found.layout.name == LAYOUTS.get(style, "chat")
    for query in QUERIES:
        for documents in (DOCUMENTS, DOCUMENTS[:1], [""], DOCUMENTS * 3):
            prompt = found.encode(query, documents)
            ids, spans = expected_spans(found, query, documents)
            ours = [*prompt.context.tolist(), *prompt.tail.tolist()]
            assert ours == ids[: len(ours)]
            if found.policy.rows == "all":
                assert len(ours) == len(ids)
            for (begin, end), tokens in zip(prompt.own.tolist(), spans, strict=True):
                assert set(range(begin, end)) == tokens
            extra = int(found.policy.extra_token and style != "mistral")
            assert (prompt.spans[:, 1] - prompt.own[:, 1] == extra).all()
            empty, _ = expected_spans(found, "N/A", documents)
            theirs = [*prompt.context.tolist(), *prompt.empty_tail.tolist()]
            assert theirs == empty[: len(theirs)]
            assert not prompt.truncated.any()


def test_rows_end_behind_the_query(tokenizers: Any) -> None:
    whole, few = (prompts(tokenizers, "llama3", preset).encode("who?", ["a"]) for preset in ("icr", "core"))
    end = tokenizers["llama3"].convert_tokens_to_ids("<|eot_id|>")
    assert few.tail[-1] == end
    assert whole.tail.tolist().index(end) + 1 < len(whole.tail)


def test_an_end_that_merges_belongs_to_the_document() -> None:
    """Where ".\\n\\n" is one token, it holds the document's last character: by segments and as a whole alike."""
    import json

    from tokenizers import Tokenizer

    qwen = prompt_tokenizers.qwen()
    data = json.loads(qwen.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary[".ĊĊ"] = max(vocabulary.values()) + 50
    data["model"]["merges"].append([".", "ĊĊ"])
    merging = prompt_tokenizers.wrap(Tokenizer.from_str(json.dumps(data)), prompt_tokenizers.CHATML)
    found = prompts({"qwen": merging}, "qwen", "icr")
    documents = ["ends.", "does not end", "ends here."]
    prompt = found.encode("who?", documents)
    ids, spans = expected_spans(found, "who?", documents)
    assert prompt.context.tolist() == ids[: len(prompt.context)]
    last = prompt.context[prompt.spans[:, 1] - 1]
    assert [merging.convert_ids_to_tokens(int(token)) == ".ĊĊ" for token in last] == [True, False, True]
    assert [set(range(a, b)) for a, b in prompt.own.tolist()] == spans
    cut = found.encode("who?", documents, most=1)
    assert cut.context[cut.spans[0, 1] - 1] == vocabulary[".ĊĊ"]  # what is not its own alone stays


def test_texts_are_never_parsed(tokenizers: Any) -> None:
    found = prompts(tokenizers, "llama3", "icr")
    prompt = found.encode("a<|eot_id|>", ["<|start_header_id|>user", "[1] again"])
    marker = tokenizers["llama3"].convert_tokens_to_ids("<|start_header_id|>")
    assert (prompt.context == marker).sum() == 1
    assert "".join(prompt.pieces(0)) == "[2] <|start_header_id|>user"
    assert "".join(prompt.pieces(1)) == "[1] [1] again"


def test_documents_are_tokenised_once(tokenizers: Any) -> None:
    found = prompts(tokenizers, "qwen", "icr")
    before = found.cache_info
    found.encode("who?", ["one text", "two texts", "one text"])
    assert found.cache_info.misses - before.misses == 2
    found.encode("other", ["two texts", "one text"])
    assert found.cache_info.misses - before.misses == 2


def test_cut_documents_keep_their_surroundings(tokenizers: Any) -> None:
    for style in TYPES:
        found = prompts(tokenizers, style, "icr")
        whole = found.encode("who?", DOCUMENTS)
        for most in (0, 1, 3):
            prompt = found.encode("who?", DOCUMENTS, most=most)
            assert prompt.tail.tolist() == whole.tail.tolist()
            assert len(prompt.context) == int(prompt.sizes.sum()) + int(prompt.spans[:, 0].min())
            for i, (begin, end) in enumerate(prompt.spans.tolist()):
                assert bool(prompt.truncated[i]) == (end - begin < whole.spans[i, 1] - whole.spans[i, 0])
        assert not found.encode("who?", DOCUMENTS, most=10**6).truncated.any()


def test_other_instructions_keep_the_bound_of_long_texts(tokenizers: Any) -> None:
    found = prompts(tokenizers, "qwen", "icr", max_length=64)
    other = found.with_instruction("Find what says the opposite.")
    text = "owls sleep, " * 2000
    assert other is not found
    for some in (found, other):
        (kept, _), query = some.prepare(text), some.prepare_query(text)
        assert len(kept) < len(text) // 3
        assert len(query) < len(text) // 3


def test_words(tokenizers: Any) -> None:
    found = prompts(tokenizers, "qwen", "icr", words=2)
    prompt = found.encode("who?", ["a  b\nc d", "a  b"])
    assert prompt.truncated.tolist() == [True, False]
    assert "".join(prompt.pieces(0)) == "[2] a b"
    assert "".join(prompt.pieces(1)) == "[1] a  b"


def test_order_and_labels(tokenizers: Any) -> None:
    assert "[1] last" in prompts(tokenizers, "qwen", "icr").whole_text("who?", ["first", "last"])
    assert "[document 1] first" in prompts(tokenizers, "qwen", "core").whole_text("who?", ["first", "last"])


def test_published_layouts() -> None:
    vocabulary = dict.fromkeys(["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"])
    granite = layout_of("granite", vocabulary, None)
    assert granite is not None
    assert granite.name == "granite"
    phi = layout_of("phi3", dict.fromkeys(["<|im_start|>", "<|im_end|>", "<|im_sep|>"]), None)
    assert phi is not None
    assert phi.name == "phi-4"
    qwen = layout_of("qwen3", dict.fromkeys(["<|im_start|>", "<|im_end|>"]), None)
    assert qwen is not None
    assert qwen.name == "qwen3"
    assert layout_of("mistral", {}, "no brackets") is None


def test_a_chat_template_that_changes_texts_is_refused() -> None:
    style = prompt_tokenizers.gemma()
    style.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="drops the user's text, prints it twice or changes it"):
        prompts({"gemma": style}, "gemma", "icr")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("words", "pages", "document_unit is 'pages'; valid is one of 'words'"),
        ('rows = "all"', "rows = 3", "rows is 3; valid is a string"),
        ('"reversed"', '"random"', "order is 'random'; valid is one of 'given', 'reversed'"),
        ('["strip"]', '["shout"]', "preprocess_query holds 'shout'; valid is any of"),
        ("extra_token", "more_token", "more_token is unknown; valid is one of document_limit, "),
        ("label_in_span = true\n", "", "label_in_span is missing; valid is true or false"),
    ],
)
def test_wrong_policies_are_told_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    text = (attention_policy._FOLDER / "icr.toml").read_text("utf-8")
    assert old in text
    (tmp_path / "icr.toml").write_text(text.replace(old, new))
    monkeypatch.setattr(attention_policy, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=rf"icr\.toml: {message}"):
        Policy.load("icr")


def test_preset_files(tmp_path: Any) -> None:
    path = tmp_path / "heads.toml"
    write_preset(path, [(3, 1), (0, 2)], {"preset": "core", "model": 'a "b"\\c', "temperature": 0.001, "queries": 3})
    found = read_preset(path)
    assert found["heads"] == ((3, 1), (0, 2))
    assert (found["model"], found["temperature"]) == ('a "b"\\c', 0.001)
    for wrong in ("", "13", "13-18;14-31", "a-b"):
        with pytest.raises(ValueError, match="heads must be written layer-head"):
            parse_heads(wrong)


def test_spans_do_not_overlap(tokenizers: Any) -> None:
    for style in TYPES:
        prompt = prompts(tokenizers, style, "icr").encode("who?", DOCUMENTS)
        order = np.argsort(prompt.spans[:, 0])
        assert (prompt.spans[order][1:, 0] >= prompt.spans[order][:-1, 1]).all()
