"""Template files: what ships, what each says word by word, and what a wrong file is told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastrerank.inputs.prompts import Template, list_templates, parse_format
from fastrerank.inputs.prompts.template_layout import Values, expand, fill

NAMES = [
    "bge-gemma",
    "coderankllm",
    "coderankllm-issue",
    "dear-listwise",
    "dear-stage1",
    "duot5",
    "erank",
    "first",
    "first-rank_llm",
    "grouprank",
    "insertrank",
    "monoptt5",
    "monot5",
    "monot5-blank",
    "monot5-sim",
    "monot5-yes",
    "mxbai-rerank-v2",
    "prorank",
    "prp",
    "prp-t5",
    "qwen3-reranker",
    "rank-r1",
    "rank_zephyr",
    "rankgpt",
    "rankllama",
    "rankt5",
    "reasonrank",
    "reasonrank-qwen3",
    "relevance",
    "sentence-transformers",
    "setwise",
    "setwise-t5",
]

MINIMAL = """
kind = "pointwise"
source = "here"
labels = ["yes", "no"]
text = "q {query} d {document}"
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def turns(name: str, query: str, documents: list[str], notes: list[str] | None = None, instruction: str | None = None):
    template = Template.load(name)
    instruction = template.instruction if instruction is None else instruction
    prepared = [template.prepare_document(document)[0] for document in documents]
    values = Values(template.prepare_query(query), instruction, prepared, notes or [])
    laid_out = expand(template, len(documents), instruction)
    return [(turn.role, fill(turn.pieces, values)) for turn in laid_out]


def test_every_published_template_ships():
    assert sorted(list_templates()) == NAMES
    assert all(list_templates().values())


@pytest.mark.parametrize("name", NAMES)
def test_a_template_knows_itself(name):
    template = Template.load(name)
    assert template.name == name
    assert name in list_templates(template.kind)
    assert template.chat == bool(template.messages)
    count = {"pointwise": 1, "pairwise": 2}.get(template.kind, 3)
    texts = turns(name, "QUERY", [f"DOC{i}" for i in range(count)], ["NOTE"] * count)
    whole = "\n".join(text for _, text in texts)
    assert "QUERY" in whole
    assert all(whole.count(f"DOC{i}") == 1 for i in range(count))
    assert whole.count("NOTE") == (count if template.uses_notes else 0)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'firts'.*bge-gemma, .*first"):
        Template.load("firts")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        Template.load(tmp_path / "nowhere.toml")
    with pytest.raises(TypeError, match="int"):
        Template.load(3)
    with pytest.raises(ValueError, match="'many'"):
        list_templates("many")


# Written out here by hand from the published sources, not taken from the files.


def test_qwen3_reranker_word_by_word():
    assert turns("qwen3-reranker", "what is x", ["x is y"]) == [
        (
            "",
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
            "<Query>: what is x\n<Document>: x is y<|im_end|>\n<|im_start|>assistant\n",
        )
    ]
    assert Template.load("qwen3-reranker").suffix == "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", ["mxbai-rerank-v2", "prorank"])
@pytest.mark.parametrize("instruction", ["", "be strict"])
def test_mxbai_word_by_word(name, instruction):
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert [text for _, text in turns(name, "Q", ["D"], instruction=instruction)] == [
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
        f"instruction: {instruction}\nquery: Q" if instruction else "query: Q",
        "\n",
        "document: D",
        "\n",
        task,
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_bge_gemma_word_by_word():
    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    assert [text for _, text in turns("bge-gemma", "Q", ["D"])] == ["A: Q", "\n", "B: D", "\n", prompt]


@pytest.mark.parametrize(
    ("name", "article", "gap", "example", "end"),
    [
        ("first", "a", "\n", "[D] > [B]", "Only respond with"),
        ("first-rank_llm", "an", "", "[B] > [A]", "Answer concisely and directly and only respond with"),
    ],
)
def test_both_forms_of_first_word_by_word(name, article, gap, example, end):
    system = "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the query"
    assert turns(name, "who?", ["one", " two  words "]) == [
        ("system", system),
        (
            "user",
            f"I will provide you with 2 passages, each indicated by {article} alphabetical identifier []. Rank the "
            f"passages based on their relevance to the search query: who?.\n{gap}[A] one\n[B] two words\n"
            "Search Query: who?.\nRank the 2 passages above based on their relevance to the search query. All the "
            "passages should be included and listed using identifiers, in descending order of relevance. The output "
            f"format should be [] > [], e.g., {example}, {end} the ranking results, do not say any word or explain.",
        ),
    ]
    assert Template.load(name).suffix == "["


def test_rankgpt_turn_by_turn():
    assert turns("rankgpt", "who", ["one", "Title: Content: two"]) == [
        (
            "system",
            "You are RankGPT, an intelligent assistant that can rank passages based on their relevancy to the query.",
        ),
        (
            "user",
            "I will provide you with 2 passages, each indicated by number identifier []. \n"
            "Rank the passages based on their relevance to query: who.",
        ),
        ("assistant", "Okay, please provide the passages."),
        ("user", "[1] one"),
        ("assistant", "Received passage [1]."),
        ("user", "[2] two"),
        ("assistant", "Received passage [2]."),
        (
            "user",
            "Search Query: who. \nRank the 2 passages above based on their relevance to the search query. The passages "
            "should be listed in descending order using identifiers. The most relevant passages should be listed "
            "first. "
            "The output format should be [] > [], e.g., [1] > [2]. Only response the ranking results, do not say any "
            "word or explain.",
        ),
    ]


@pytest.mark.parametrize(("name", "role"), [("prp", "user"), ("prp-t5", "")])
def test_prp_word_by_word(name, role):
    assert turns(name, "who", ["one", "two"]) == [
        (
            role,
            'Given a query "who", which of the following two passages is more relevant to the query?\n\n'
            'Passage A: "one"\n\nPassage B: "two"\n\nOutput Passage A or Passage B:',
        )
    ]


@pytest.mark.parametrize(("name", "role"), [("setwise", "user"), ("setwise-t5", "")])
def test_setwise_word_by_word(name, role):
    assert turns(name, "who", ["one", "two", "three"]) == [
        (
            role,
            'Given a query "who", which of the following passages is the most relevant one to the query?\n\n'
            'Passage A: "one"\n\nPassage B: "two"\n\nPassage C: "three"\n\n'
            "Output only the passage label of the most relevant passage:",
        )
    ]
    assert Template.load(name).most_documents == 23


def test_insertrank_prints_a_score_per_passage():
    _, (_, user) = turns("insertrank", "who", ["one", "two"], ["12.346", "0.500"])
    assert "\n[1] one\nBM25 score for passge [1]: 12.346\n[2] two\nBM25 score for passge [2]: 0.500\nSearch Q" in user


def test_code_rankers_end_the_query_as_published():
    assert "\nDoc String: who.\nRank the 1 code snippets above" in turns("coderankllm", "who", ["x"])[1][1]
    assert "\nGitHub Issue: who. \nRank the 1 code functions above" in turns("coderankllm-issue", "who", ["x"])[1][1]


def test_grouprank_keeps_the_braces_of_its_example():
    (_, system), (_, user) = turns("grouprank", "who", ["a\n\n\nb", "x" * 4000])
    assert system.endswith("query\n")
    assert '```json\n{"[1]": 5, "[2]": 3, "[3]": 8}\n``` \n</answer>\n' in user
    assert f"Documents:\n[1]. a b\n\n[2]. {'x' * 3000}\n\n\n\n## Final" in user


def test_rank_r1_lists_as_in_its_training_file():
    assert "relevant?\n[1]: one\n[2]: two\nAfter completing" in turns("rank-r1", "who", ["one", "two"])[1][1]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("first", "[B] and [12] and [Bc]", "(B) and [12] and (Bc)"),
        ("first-rank_llm", "[B] and [12]", "[B] and (12)"),
        ("rankgpt", "[3]  x", "[3] x"),
        ("first", "Title: Content: text", "text"),
        ("monot5", "[3] Title: Content: ", "[3] Title: Content: "),
    ],
)
def test_published_rewriting(name, text, expected):
    assert Template.load(name).prepare_document(text) == (expected, False)


def test_published_limits():
    words = " ".join(map(str, range(400)))
    text, cut = Template.load("first").prepare_document(words)
    assert (text.split(), cut) == (words.split()[:300], True)
    assert Template.load("first").prepare_query("[3] x") == "[3] x"
    assert Template.load("rank_zephyr").prepare_query("[3] x") == "(3) x"
    assert Template.load("reasonrank").prepare_query(" [3] x ") == "(3) x"


@pytest.mark.parametrize("text", ["{query}", "{}", "{{x}}", "{0}", "}{", "{document} {instruction!r:>9}"])
@pytest.mark.parametrize("name", ["first", "qwen3-reranker", "rankgpt"])
def test_braces_of_user_texts_are_text(name, text):
    whole = "\n".join(content for _, content in turns(name, text, [text]))
    assert whole.count(text) >= 2


def test_identifiers():
    first = Template.load("first")
    assert first.identifier_labels(26)[-1] == "Z"
    with pytest.raises(ValueError, match=r"'first' cannot name 27 .* 26 letters"):
        first.identifier_labels(27)
    with pytest.raises(ValueError, match="digits 1 to 9"):
        Template.load("rank_zephyr").identifier_labels(10)
    with pytest.raises(ValueError, match="at least 1"):
        first.identifier_labels(0)
    with pytest.raises(ValueError, match="at most 23"):
        Template.load("setwise").identifier_labels(24)
    assert Template.load("setwise").identifier_labels(2) == (" A", " B")
    with pytest.raises(ValueError, match="no identifiers"):
        Template.load("prp").identifier_labels(2)
    assert Template.load("rank_zephyr").identifier(19) == "20"  # a generated permutation names as many as it likes


def test_ones_own_file(tmp_path):
    template = Template.load(written(tmp_path, MINIMAL))
    assert (template.name, template.source) == ("mine", "here")
    assert Template.load(str(tmp_path / "mine.toml")) == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('kind = "pointy"', r"kind is 'pointy'; valid is one of 'pointwise'"),
        ('sourc = "x"', r"sourc is unknown; valid is one of .*source"),
        ("labels = [1, 2]", r"labels is \[1, 2\]; valid is a list of strings"),
        ('labels = ["a", "a"]', r"labels is \['a', 'a'\]; valid is different"),
        ("labels = []", "labels is missing"),
        ('text = "q {query} {documnt}"', r"text has the placeholder \{documnt\}; valid is .*\{document\}"),
        ('text = "q {query!r} {document}"', r"text: \{query\} is no placeholder"),
        ('text = "q {query"', "text: "),
        ('text = "{query}"', r"no text has the placeholder \{document\}"),
        ('text = "{query} {document} {document}"', "must stand once"),
        ('text = "{document}"', r"no text has the placeholder \{query\}"),
        ("max_length = -3", "max_length is -3; valid is an integer of at least 1"),
        ("max_length = true", "max_length is True"),
        ("document_limit = 3", "document_unit is ''; valid is given together"),
        ('document_unit = "pages"', "document_unit is 'pages'; valid is one of '', 'words'"),
        ('preprocess = ["shout"]', "preprocess holds 'shout'; valid is any of fix-text"),
        ('identifiers = "numeric"', "identifiers is 'numeric' in a pointwise template"),
        ('score = "logit"', "score is 'logit' of 2 labels; valid is 1 labels"),
        ('score = "expectation"', "labels that are numbers"),
        ('readout = "head"', 'readout is "head"'),
        ('segments = ["{query}", "{document}"]', "exactly one of .* got text and segments"),
        ('decoder = "x"', "decoder is given"),
        ('system_joiner = " "', "system_joiner is given"),
        ("[chat_options]\na = 1", "chat_options is given"),
        ('special_tokens = "both"', "special_tokens is 'both'"),
        ('document = "x {document}"', "document is given"),
        ("order = 3", "order is 3; valid is a string"),
        ('algorithm = "groups"', "algorithm is 'groups'; valid is that in a listwise template only"),
        ('algorithm = "pairs"', "algorithm is 'pairs'; valid is one of '', 'windows', 'groups'"),
        ('stop = "</answer>"', "stop is '</answer>'; valid is a list of strings"),
        ("max_new_tokens = 0", "max_new_tokens is 0; valid is an integer of at least 1"),
    ],
)
def test_wrong_files_are_told_what_is_wrong(tmp_path, change, message):
    field = change.split(" =")[0]
    kept = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(f"{field} ="))
    file = written(tmp_path, f"{kept}\n{change}\n")
    with pytest.raises(ValueError, match=re.escape(str(file)) + ".*" + message):
        Template.load(file)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            'role = "tool"\ncontent = "{query} {document}"',
            r"messages\[0\]\.role is 'tool'; valid is one of system, user",
        ),
        ('role = "user"', r"messages\[0\]\.content is missing; valid is a string"),
        ('role = "user"\ncontent = "{query} {document}"\nrepet = true', r"messages\[0\]\.repet is unknown"),
        ('role = "user"\ncontent = "{query} {document}"\nrepeat = true', "repeat a turn per document"),
        ('role = "user"\ncontent = "{query} {document}"\nrepeat = 3', r"repeat is 3; valid is true or false"),
    ],
)
def test_wrong_messages_are_told_what_is_wrong(tmp_path, messages, message):
    text = f'kind = "pointwise"\nsource = "x"\nlabels = ["yes"]\n[[messages]]\n{messages}\n'
    with pytest.raises(ValueError, match=message):
        Template.load(written(tmp_path, text))


def test_reversed_order_keeps_each_documents_identifier(tmp_path):
    text = """
kind = "listwise"
source = "here"
identifiers = "numeric"
order = "reversed"
document = "[{identifier}] {document}"
separator = " | "
text = "{query}: {documents}."
"""
    template = Template.load(written(tmp_path, text))
    (turn,) = expand(template, 3, "")
    assert fill(turn.pieces, Values("q", "", ["a", "b", "c"], [])) == "q: [3] c | [2] b | [1] a."


def test_files_that_are_no_toml(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.toml: not a readable TOML file"):
        Template.load(written(tmp_path, "kind = "))


def test_fix_text_needs_ftfy(tmp_path, monkeypatch):
    template = Template.load(written(tmp_path, MINIMAL + 'preprocess = ["fix-text"]\n'))
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="pip install ftfy"):
        template.prepare_document("x")


def test_parse_format_keeps_doubled_braces():
    assert parse_format("{{a}} {b}") == [("{", None), ("a}", None), (" ", "b")]
