"""`FlagReranker` against FlagEmbedding's rules written out, and against its class where it is installed."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import tiny as factory
import tokenizers
import torch
import transformers

import fastrerank
from fastrerank.integrations.flag_embedding import FlagReranker

QUERY = "how long do fleas live"
PAIRS = [
    (QUERY, "a flea lives up to one year"),
    (QUERY, ""),
    (" ".join(factory.texts(1, 3, 30)), "cats sleep"),
    (" ".join(["owl"] * 90), "the owl sleeps " * 40),
    ("", "old stone bank"),
]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param)


def upstream(
    folder: Path, pairs: Sequence[tuple[str, str]], query_max_length: int | None, max_length: int
) -> list[float]:
    """FlagEmbedding's scores: queries cut to three quarters, passages to what is left, one pair at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    first, last = backend.token_to_id(tokenizer.cls_token), backend.token_to_id(tokenizer.sep_token)
    between = [last, last] if factory.is_roberta(folder.name) or "roberta" in model.config.model_type else [last]
    most = max_length * 3 // 4 if query_max_length is None else query_max_length
    scores = []
    for query, passage in pairs:
        ids = backend.encode(query, add_special_tokens=False).ids[:most]
        rest = backend.encode(passage, add_special_tokens=False).ids[:max_length]
        excess = len(ids) + len(rest) + 2 + len(between) - max_length
        if 0 < excess < len(rest):
            rest = rest[:-excess]
        whole = [first, *ids, *between, *rest, last]
        types = [0] * (len(ids) + 1 + len(between)) + [1] * (len(rest) + 1)
        types = types if model.config.type_vocab_size > 1 else [0] * len(whole)
        with torch.inference_mode():
            logits = model(torch.tensor([whole]), token_type_ids=torch.tensor([types])).logits
        scores.append(float(logits[0, 0]))
    return scores


def close(ours: Sequence[float], expected: Sequence[float]) -> bool:
    return bool(np.abs(np.array(ours) - np.array(expected)).max() <= 1e-4 * np.abs(expected).max())


def test_queries_and_passages_are_cut_as_upstream(folder: Path) -> None:
    flag = FlagReranker(str(folder), device="cpu", max_length=64)
    assert close(flag.compute_score(PAIRS), upstream(folder, PAIRS, None, 64))
    assert close(flag.compute_score(PAIRS, max_length=32), upstream(folder, PAIRS, None, 32))
    assert close(flag.compute_score(PAIRS, query_max_length=5), upstream(folder, PAIRS, 5, 64))
    own = FlagReranker(str(folder), device="cpu", max_length=64, query_max_length=5)
    assert own.compute_score(PAIRS) == flag.compute_score(PAIRS, query_max_length=5)
    assert own.compute_score(PAIRS, max_length=40) == flag.compute_score(PAIRS, query_max_length=5, max_length=40)
    assert own.compute_score(PAIRS) != flag.compute_score(PAIRS)


def test_more_length_than_positions_serves_short_texts(folder: Path) -> None:
    """FlagEmbedding's default of 512 tokens, on a checkpoint of 160 positions."""
    flag = FlagReranker(str(folder), device="cpu")
    assert flag.max_length == 512
    short = [PAIRS[0], PAIRS[1], PAIRS[4], (" ".join(["owl"] * 130), "cats sleep")]
    assert close(flag.compute_score(short), upstream(folder, short, None, 512))
    assert np.isfinite(flag.compute_score(PAIRS)).all()


def test_instructions(folder: Path) -> None:
    plain = FlagReranker(str(folder), devices="cpu", max_length=None)
    both = FlagReranker(str(folder), False, "find", "{}\\n{}:", "read", "{1} ({0})", devices=["cpu"], max_length=None)
    pairs = PAIRS[:2]
    assert both.compute_score(pairs) == plain.compute_score([(f"find\n{q}:", f"{p} (read)") for q, p in pairs])
    query = FlagReranker(str(folder), query_instruction_for_rerank="find ", devices="cpu", max_length=None)
    assert query.compute_score(pairs) == plain.compute_score([(f"find {q}", p) for q, p in pairs])
    passage = FlagReranker(str(folder), passage_instruction_for_rerank="read ", devices="cpu", max_length=None)
    assert passage.compute_score(pairs) == plain.compute_score([(q, f"read {p}") for q, p in pairs])
    assert len({tuple(one.compute_score(pairs)) for one in (plain, both, query, passage)}) == 4
    with pytest.raises(ValueError, match=r"passage_instruction_format must be a format of two texts.*'\{\}\{\}\{\}'"):
        FlagReranker(str(folder), passage_instruction_format="{}{}{}", devices="cpu")


def test_arguments_stand_in_upstreams_order() -> None:
    names = list(inspect.signature(FlagReranker).parameters)
    assert names[:13] == [
        "model_name_or_path",
        "use_fp16",
        "query_instruction_for_rerank",
        "query_instruction_format",
        "passage_instruction_for_rerank",
        "passage_instruction_format",
        "trust_remote_code",
        "cache_dir",
        "devices",
        "batch_size",
        "query_max_length",
        "max_length",
        "normalize",
    ]
    call = list(inspect.signature(FlagReranker.compute_score).parameters)
    assert call == ["self", "sentence_pairs", "batch_size", "query_max_length", "max_length", "normalize"]


def test_what_is_given_is_honoured_or_refused(folder: Path) -> None:
    path = str(folder)
    expected = FlagReranker(path, devices="cpu").compute_score(PAIRS)
    for devices in ("cpu", ["cpu"], ["cpu", "cpu"]):
        assert FlagReranker(path, devices=devices).compute_score(PAIRS) == expected
        assert FlagReranker(path, device=devices, batch_size=2).compute_score(PAIRS, 3) == expected
    assert FlagReranker(path, use_fp16=True, devices="cpu").compute_score(PAIRS) == expected  # as upstream on CPUs
    half = FlagReranker(path, use_bf16=True, devices="cpu")
    assert half.model.dtype == "bfloat16"
    assert half.compute_score(PAIRS) != expected
    assert FlagReranker(path, devices="cpu", dtype="bfloat16").compute_score(PAIRS) == half.compute_score(PAIRS)
    normal = FlagReranker(path, devices="cpu", normalize=True)
    assert np.allclose(normal.compute_score(PAIRS), 1 / (1 + np.exp(-np.array(expected))), atol=1e-6)
    assert normal.compute_score(PAIRS, normalize=False) == expected
    assert normal.compute_score(PAIRS[0], normalize=False) == expected[:1]
    assert normal.compute_score([]) == []
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "cutoff", {"cutoff": 3}),
        (TypeError, "give one", {"device": "cpu", "devices": "cpu"}),
        (TypeError, "use_fp16", {"dtype": "float32", "use_fp16": True}),
        (ValueError, "empty list", {"devices": []}),
        (ValueError, "max_length", {"max_length": 0}),
        (ValueError, "max_tokens_per_query", {"query_max_length": 0}),
    ]
    for kind, message, options in wrong:
        with pytest.raises(kind, match=message):
            FlagReranker(path, **{"device": "cpu", **options} if "devices" not in options else options)
    with pytest.raises(TypeError, match=r"sentence_pairs\[1\] must be a \(query, passage\) pair, got str"):
        normal.compute_score([PAIRS[0], "text"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="device"):
        normal.compute_score(PAIRS, device="cuda")  # type: ignore[call-arg]


def test_upstreams_two_tests_of_rerankers(folder: Path) -> None:
    """A reranker made with `device=` scores one pair and several, each with a float (FlagEmbedding 1.4.2)."""
    model = FlagReranker(str(folder), device="cpu")
    (score,) = model.compute_score([PAIRS[0]])
    assert isinstance(score, float)
    scores = model.compute_score(PAIRS[:3])
    assert isinstance(scores, list)
    assert [type(one) for one in scores] == [float] * 3
    assert (
        scores[0]
        == score
        == float(fastrerank.CrossEncoder(folder, device="cpu").score(*PAIRS[0][:1], [PAIRS[0][1]])[0])
    )


def test_upstreams_own_class(folder: Path, tmp_path: Path) -> None:
    peer = pytest.importorskip("FlagEmbedding")
    # With transformers 5 it makes text of cut ids and tokenises that again, which needs a decoder; an empty passage
    # then is no second text, as it is with transformers 4 and here.
    folder = Path(shutil.copytree(folder, tmp_path / folder.name))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    pairs = [pair for pair in PAIRS if pair[1]]
    theirs = peer.FlagReranker(str(folder), devices="cpu", query_instruction_for_rerank="owl ", max_length=64)
    ours = FlagReranker(str(folder), devices="cpu", query_instruction_for_rerank="owl ", max_length=64)
    assert close(ours.compute_score(pairs), theirs.compute_score(pairs))
    assert close(
        ours.compute_score(pairs, query_max_length=7, max_length=40, normalize=True),
        theirs.compute_score(pairs, query_max_length=7, max_length=40, normalize=True),
    )
