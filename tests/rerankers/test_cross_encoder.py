"""`fastrerank.CrossEncoder` in place of `sentence_transformers.CrossEncoder`, on the same checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
import sentence_transformers
import tiny as factory
import torch

import fastrerank
from fastrerank import CrossEncoder

Tiny = Callable[..., Path]
QUERY = "where do old cats sleep?"
TEXTS = [*factory.texts(24), "", "Café [SEP] owl", "owl"]
PAIRS = [(QUERY, text) for text in TEXTS]
BOUND = 2e-5


@pytest.fixture(scope="module")
def both(tiny: Tiny) -> tuple[sentence_transformers.CrossEncoder, CrossEncoder]:
    folder = tiny("bert")
    return sentence_transformers.CrossEncoder(str(folder), device="cpu"), CrossEncoder(folder)


def copy_of(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return target


def assert_same_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], bound: float = BOUND) -> None:
    """Equal scores by document, and equal order except between scores closer than the bound."""
    assert {row["corpus_id"] for row in ours} == {row["corpus_id"] for row in theirs}
    expected = {row["corpus_id"]: float(row["score"]) for row in theirs}
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine["score"], float)
        assert mine.keys() == other.keys()
        assert abs(mine["score"] - expected[mine["corpus_id"]]) <= bound
        assert abs(expected[mine["corpus_id"]] - float(other["score"])) <= 2 * bound


@pytest.mark.parametrize("family", factory.FAMILIES)
@pytest.mark.parametrize("labels", [1, 3])
def test_every_family_predicts_and_ranks_the_same(tiny: Tiny, family: str, labels: int) -> None:
    folder = tiny(family, labels=labels)
    theirs, ours = sentence_transformers.CrossEncoder(str(folder), device="cpu"), CrossEncoder(folder)
    expected, scores = theirs.predict(PAIRS), ours.predict(PAIRS)
    assert scores.dtype == expected.dtype == np.float32
    assert scores.shape == expected.shape
    assert np.abs(scores - expected).max() <= BOUND * max(1, np.abs(expected).max())
    assert np.ptp(expected, axis=0).max() > 0.05
    assert (ours.num_labels, ours.max_length) == (theirs.num_labels, theirs.max_seq_length)
    if labels == 1:
        assert_same_rows(ours.rank(QUERY, TEXTS), theirs.rank(QUERY, TEXTS))
        logits = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
        assert np.abs(ours.score(QUERY, TEXTS) - logits).max() <= BOUND * np.abs(logits).max()
    else:
        with pytest.raises(ValueError, match="one label"):
            ours.rank(QUERY, TEXTS)
        with pytest.raises(ValueError, match="one label"):
            ours.score(QUERY, TEXTS)


INPUTS: dict[str, Any] = {
    "tuples": PAIRS,
    "lists": [list(pair) for pair in PAIRS],
    "tuple of tuples": tuple(PAIRS),
    "2-D str": np.array(PAIRS),
    "2-D object": np.array(PAIRS, dtype=object),
    "one pair": PAIRS[0],
    "one list": list(PAIRS[0]),
    "1-D str": np.array(PAIRS[0]),
    "1-D object": np.array(PAIRS[0], dtype=object),
    "one of one": PAIRS[:1],
    "empty": [],
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"apply_softmax": True}, {"batch_size": 3}],
)
@pytest.mark.parametrize("labels", [1, 3])
def test_inputs_and_results_have_the_same_form(tiny: Tiny, name: str, options: dict[str, Any], labels: int) -> None:
    folder = tiny("bert", labels=labels)
    expected = _theirs(folder).predict(INPUTS[name], **options)
    scores = CrossEncoder(folder).predict(INPUTS[name], **options)
    if isinstance(expected, list):
        assert isinstance(scores, list)
        assert len(scores) == len(expected)
        assert all(isinstance(a, torch.Tensor) and a.shape == b.shape for a, b in zip(scores, expected, strict=True))
        scores, expected = [[float(x) for s in some for x in s.ravel()] for some in (scores, expected)]
    elif isinstance(expected, torch.Tensor):
        assert isinstance(scores, torch.Tensor)
        assert scores.dtype == expected.dtype
    else:
        assert isinstance(scores, (np.ndarray, np.generic))
    if name == "empty":  # its length is all that counts
        assert len(scores) == len(expected) == 0
        return
    scores, expected = np.asarray(scores), np.asarray(expected)
    assert scores.shape == expected.shape
    assert np.abs(scores - expected).max(initial=0) <= BOUND


_LOADED: dict[Path, sentence_transformers.CrossEncoder] = {}


def _theirs(folder: Path) -> sentence_transformers.CrossEncoder:
    if folder not in _LOADED:
        _LOADED[folder] = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    return _LOADED[folder]


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "activation",
    [
        torch.nn.Identity(),
        torch.nn.Sigmoid(),
        torch.nn.Tanh(),
        torch.nn.ReLU(),
        torch.nn.Softplus(),
        Doubled(),
        torch.sigmoid,
    ],
)
def test_activations(both: tuple[Any, CrossEncoder], tiny: Tiny, activation: Any) -> None:
    theirs, ours = both
    expected = theirs.predict(PAIRS, activation_fn=activation)
    assert np.abs(ours.predict(PAIRS, activation_fn=activation) - expected).max() <= BOUND
    assert np.abs(CrossEncoder(tiny("bert"), activation_fn=activation).predict(PAIRS) - expected).max() <= BOUND
    assert_same_rows(
        ours.rank(QUERY, TEXTS, activation_fn=activation), theirs.rank(QUERY, TEXTS, activation_fn=activation)
    )


def test_activations_by_name_and_in_numpy(both: tuple[Any, CrossEncoder]) -> None:
    _, ours = both
    logits = ours.score(QUERY, TEXTS).astype(np.float64)
    for name, function in {
        "identity": lambda x: x,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    }.items():
        np.testing.assert_allclose(ours.predict(PAIRS, activation_fn=name), function(logits), atol=1e-6)
    np.testing.assert_allclose(ours.predict(PAIRS, activation_fn=lambda x: x + 1), logits + 1, atol=1e-6)
    with pytest.raises(ValueError, match="identity, sigmoid, tanh, relu"):
        ours.predict(PAIRS, activation_fn="swoosh")
    with pytest.raises(TypeError, match="activation_fn must be a callable or a name, got int"):
        ours.predict(PAIRS, activation_fn=3)


@pytest.mark.parametrize(
    "saved",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.ReLU"}},
    ],
)
def test_saved_activations(tiny: Tiny, tmp_path: Path, saved: dict[str, Any]) -> None:
    folder = copy_of(tiny("bert"), tmp_path / "model", **saved)
    expected = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    assert np.abs(CrossEncoder(folder).predict(PAIRS) - expected).max() <= BOUND
    again = tmp_path / "again"
    sentence_transformers.CrossEncoder(str(folder), device="cpu").save_pretrained(str(again))
    assert np.abs(CrossEncoder(again).predict(PAIRS) - expected).max() <= BOUND


def test_ranks_by_logit_where_the_activation_saturates(tmp_path: Path) -> None:
    def steep(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"classifier.weight": tensors["classifier.weight"] * 200}

    model = CrossEncoder(factory.save(tmp_path, "bert", change=steep))
    rows = model.rank(QUERY, TEXTS)
    assert len({row["score"] for row in rows}) < len(rows)  # sigmoid gives exact ties
    logits = model.score(QUERY, TEXTS)
    assert [row["corpus_id"] for row in rows] == sorted(range(len(TEXTS)), key=lambda i: (-logits[i], i))


def test_rank_options(both: tuple[Any, CrossEncoder]) -> None:
    theirs, ours = both
    for options in (
        {"top_k": 5},
        {"top_k": 0},
        {"top_k": 99},
        {"return_documents": True},
        {"top_k": 3, "return_documents": True},
    ):
        expected = theirs.rank(QUERY, TEXTS, **options)
        assert_same_rows(ours.rank(QUERY, TEXTS, **options), expected)
        assert [row.get("text") for row in ours.rank(QUERY, TEXTS, **options)] == [row.get("text") for row in expected]
    assert ours.rank(QUERY, []) == []
    for top_k in (-1, 1.5, True):
        with pytest.raises(ValueError, match="top_k"):
            ours.rank(QUERY, TEXTS, top_k=top_k)  # type: ignore[arg-type]


def test_max_length_of_a_call_and_of_those_that_follow(both: tuple[Any, CrossEncoder], tiny: Tiny) -> None:
    theirs, ours = both[0], CrossEncoder(tiny("bert"))
    short = {"text": {"max_length": 12, "truncation": True, "padding": True}}
    shortened = ours.predict(PAIRS, processing_kwargs=short)
    pairs = [(query, text) for query, text in PAIRS if len(text) > 200]  # the query is no longer than what is left
    assert np.abs(ours.predict(pairs) - ours.predict(pairs, processing_kwargs=short)).max() > BOUND
    np.testing.assert_array_equal(shortened, CrossEncoder(tiny("bert"), max_length=12).predict(PAIRS))
    with pytest.raises(ValueError, match=r"'chat_template' only, got 'image', 'text'\['truncation'\]"):
        ours.predict(PAIRS, processing_kwargs={"image": {}, "text": {"truncation": "do_not_truncate"}})
    ours.max_length = 12
    assert ours.max_seq_length == 12
    np.testing.assert_array_equal(ours.predict(PAIRS), shortened)
    ours.max_seq_length = theirs.max_seq_length
    assert np.abs(ours.predict(PAIRS) - theirs.predict(PAIRS)).max() <= BOUND
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        ours.max_length = 0


@pytest.mark.parametrize("batch_size", [0, -3, 1.5, True, None])
def test_batch_size_must_be_positive(both: tuple[Any, CrossEncoder], batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        both[1].predict(PAIRS, batch_size=batch_size)
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        both[1].rank(QUERY, TEXTS, batch_size=batch_size)


def test_prompts(tiny: Tiny) -> None:
    prompts = {"search": "what is ", "other": "light "}
    theirs = sentence_transformers.CrossEncoder(str(tiny("bert")), device="cpu", prompts=prompts)
    ours = CrossEncoder(tiny("bert"), prompts=prompts)
    plain = ours.predict(PAIRS)
    for options in ({"prompt_name": "search"}, {"prompt": "light "}, {"prompt": "light ", "prompt_name": "search"}):
        scores = ours.predict(PAIRS, **options)
        assert np.abs(scores - theirs.predict(PAIRS, **options)).max() <= BOUND
        assert np.abs(scores - plain).max() > 1e-3
        assert_same_rows(ours.rank(QUERY, TEXTS, **options), theirs.rank(QUERY, TEXTS, **options))
    default = CrossEncoder(tiny("bert"), prompts=prompts, default_prompt_name="search")
    np.testing.assert_array_equal(default.predict(PAIRS), ours.predict(PAIRS, prompt_name="search"))
    with pytest.raises(ValueError, match="search"):
        ours.predict(PAIRS, prompt_name="absent")


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_deprecated_spellings_warn_and_work(tiny: Tiny, both: tuple[Any, CrossEncoder]) -> None:
    folder, ours = tiny("bert"), both[1]
    logits = ours.score(QUERY, TEXTS)
    short = CrossEncoder(folder, max_length=12).score(QUERY, TEXTS)
    assert (short != logits).any()
    with pytest.warns(DeprecationWarning, match="positional"):
        np.testing.assert_array_equal(CrossEncoder(folder, 1, 12, None, "cpu").score(QUERY, TEXTS), short)
    with pytest.warns(DeprecationWarning, match="model_name"):
        np.testing.assert_array_equal(CrossEncoder(model_name=folder).score(QUERY, TEXTS), logits)
    with pytest.warns(DeprecationWarning, match="default_activation_function"):
        model = CrossEncoder(folder, default_activation_function=torch.nn.Identity())
    np.testing.assert_array_equal(model.predict(PAIRS), logits)
    for key in ("tokenizer_args", "tokenizer_kwargs", "processor_kwargs"):
        model = CrossEncoder(folder, **{key: {"model_max_length": 12}})
        np.testing.assert_array_equal(model.score(QUERY, TEXTS), short)
    low = CrossEncoder(folder, model_kwargs={"torch_dtype": torch.bfloat16})
    assert low.dtype == "bfloat16"
    with pytest.warns(DeprecationWarning, match="sentences"):
        np.testing.assert_array_equal(ours.predict(sentences=PAIRS, num_workers=2), ours.predict(PAIRS))
    with pytest.warns(DeprecationWarning, match="activation_fct"):
        np.testing.assert_array_equal(ours.predict(PAIRS, activation_fct=torch.nn.Identity()), logits)
    assert ours.rank(QUERY, TEXTS, convert_to_numpy=True, convert_to_tensor=False) == ours.rank(QUERY, TEXTS)
    for call in (
        lambda: CrossEncoder(folder, nonsense=1),
        lambda: ours.predict(PAIRS, nonsense=1),
        lambda: ours.rank(QUERY, TEXTS, nonsense=1),
    ):
        with pytest.raises(TypeError, match="nonsense"):
            call()


def test_attributes_that_callers_use(both: tuple[Any, CrossEncoder]) -> None:
    ours = both[1]
    assert ours.eval() is ours.to("cpu") is ours.compile() is ours
    assert ours.config.num_labels == 1
    assert ours.tokenizer.encode("owl").ids
    pool = ours.start_multi_process_pool()
    np.testing.assert_array_equal(ours.predict(PAIRS, pool=pool), ours.predict(PAIRS))
    ours.stop_multi_process_pool(pool)
    with pytest.raises(ValueError, match="cpu"):
        ours.to("cuda")
    with pytest.raises(ValueError, match="bfloat16"):
        ours.half()


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_cross_encoders_made_of_modules(tiny: Tiny, tmp_path: Path, pooling: str, family: str) -> None:
    # Transformer, Pooling, Dense, LayerNorm, Dense: how sentence-transformers builds the Ettin rerankers.
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    torch.manual_seed(0)
    transformer = Transformer(str(tiny(family)))
    width = transformer.get_embedding_dimension()
    theirs = sentence_transformers.CrossEncoder(
        device="cpu",
        modules=[
            transformer,
            Pooling(width, pooling_mode=pooling),
            Dense(width, 30, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(30),
            Dense(30, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ],
    )
    theirs.save_pretrained(str(tmp_path))
    expected = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.ptp(expected) > 0.05
    ours = CrossEncoder(tmp_path)
    assert np.abs(ours.score(QUERY, TEXTS) - expected).max() <= BOUND * max(1, np.abs(expected).max())
    assert np.abs(ours.predict(PAIRS) - theirs.predict(PAIRS)).max() <= BOUND
    assert isinstance(fastrerank.load(tmp_path), CrossEncoder)


@pytest.mark.parametrize("labels", [1, 3])
def test_attributes_equal_sentence_transformers(tiny: Tiny, labels: int) -> None:
    theirs, ours = _theirs(tiny("bert", labels=labels)), CrossEncoder(tiny("bert", labels=labels))
    assert ours.device == theirs.device
    assert theirs.device == ours.device
    assert (str(ours.device), ours.device.type, ours.device.index) == ("cpu", "cpu", None)
    assert ours.device != torch.device("cuda")
    assert torch.zeros(1, device=ours.device).device.type == "cpu"
    for name in ("num_labels", "id2label", "label2id", "name_or_path", "model_type", "hidden_size", "pad_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    assert ours.config.to_dict()["vocab_size"] == theirs.config.vocab_size
    assert ours.modalities == theirs.modalities
    for modality in ("text", "message", "image"):
        assert ours.supports(modality) == theirs.supports(modality)
    assert ours.cpu() is ours.train(False) is ours
    assert ours.training is False
    with pytest.raises(ValueError, match="only runs models"):
        ours.train()


def test_the_tokenizer_counts_and_limits(both: tuple[Any, CrossEncoder], tiny: Tiny) -> None:
    theirs, ours = both[0].tokenizer, both[1].tokenizer
    assert ours.tokenize(QUERY) == theirs.tokenize(QUERY)
    for given in ((QUERY,), (QUERY, TEXTS[0]), ([QUERY, "owl"],), ([QUERY, "owl"], TEXTS[:2])):
        for specials in (True, False):
            mine, other = ours(*given, add_special_tokens=specials), theirs(*given, add_special_tokens=specials)
            assert mine["input_ids"] == other["input_ids"]
            assert mine["attention_mask"] == other["attention_mask"]
    assert len(ours) == len(theirs)
    assert ours.model_max_length == theirs.model_max_length
    assert ours.token_to_id("owl") == theirs.convert_tokens_to_ids("owl")
    with pytest.raises(TypeError, match="padding"):
        ours(QUERY, padding=True)
    model = CrossEncoder(tiny("bert"))
    with pytest.raises(AttributeError, match="pad_token cannot be set"):
        model.tokenizer.pad_token = "owl"
    model.tokenizer.model_max_length = 12
    assert model.max_length == 12
    np.testing.assert_array_equal(model.predict(PAIRS), CrossEncoder(tiny("bert"), max_length=12).predict(PAIRS))


def test_calls_that_sentence_transformers_knows(both: tuple[Any, CrossEncoder], tiny: Tiny) -> None:
    theirs, ours = both
    pairs = [("owl", text) for text in TEXTS if len(text) > 100]
    for options in ({"max_length": 20}, {"max_length": 20, "processing_kwargs": {"text": {"max_length": 30}}}):
        assert np.abs(ours.predict(pairs, **options) - theirs.predict(pairs, **options)).max() <= BOUND
    assert (ours.predict(pairs, max_length=20) != ours.predict(pairs)).all()
    for kind in (CrossEncoder, sentence_transformers.CrossEncoder):
        with pytest.raises(ValueError, match="absent"):
            kind(str(tiny("bert")), default_prompt_name="absent")
    prompts: Any = {"prompts": {"search": "what is "}, "default_prompt_name": "search"}
    expected = sentence_transformers.CrossEncoder(str(tiny("bert")), device="cpu", **prompts).predict(
        PAIRS, activation_fn=torch.nn.Identity()
    )
    assert np.abs(CrossEncoder(tiny("bert"), **prompts).score(QUERY, TEXTS) - expected).max() <= BOUND * 2
