"""Every public name of `sentence_transformers.CrossEncoder` on ours: equal, or refused by name; and what callers do."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
import sys
from collections.abc import Callable
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
import decoders
import prompt_tokenizers
import sentence_transformers as st
import test_chat_pairs as chats
import tiny as factory
import torch
import transformers
from sentence_transformers.cross_encoder import evaluation

import fastrerank
from fastrerank import CrossEncoder
from fastrerank.inputs.limits import TooLong
from fastrerank.rerankers import activations
from fastrerank.rerankers.peer_interface import REFUSED

Tiny = Callable[..., Path]
QUERY = "where do old cats sleep?"
TEXTS = [*factory.texts(10), "", "owl"]
PAIRS = [(QUERY, text) for text in TEXTS]
BOUND = 2e-5


@pytest.fixture(scope="module")
def both(tiny: Tiny) -> tuple[st.CrossEncoder, CrossEncoder]:
    return st.CrossEncoder(str(tiny("bert")), device="cpu"), CrossEncoder(tiny("bert"))


def copy_of(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return target


# Every name of the peer's class that is not refused, with what a caller reads off it: equal on both.
SAME: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda _: True,
    "compile": lambda m: callable(m.compile),
    "config": lambda m: m.config.num_labels,
    "cpu": lambda m: m.cpu() is m,
    "default_activation_function": lambda m: callable(m.default_activation_function),
    "default_huggingface_organization": lambda m: m.default_huggingface_organization,
    "device": lambda m: (str(m.device), m.device == torch.device("cpu"), m.device.type),
    "double": lambda _: True,
    "dtype": lambda m: (m.dtype == torch.float32, torch.float32 == m.dtype),
    "eval": lambda m: m.eval() is m,
    "evaluate": lambda m: m.evaluate(lambda model, path: (model is m, path)),
    "float": lambda m: m.float() is m,
    "get_backend": lambda m: m.get_backend(),
    "get_default_activation_fn": lambda m: callable(m.get_default_activation_fn()),
    "get_max_seq_length": lambda m: m.get_max_seq_length(),
    "get_model_kwargs": lambda m: m.get_model_kwargs(),
    "half": lambda _: True,
    "has_peft_compatible_model": lambda m: isinstance(m.has_peft_compatible_model(), bool),
    "is_singular_input": lambda m: [m.is_singular_input(given) for given in SINGULAR],
    "max_length": lambda m: m.max_length,
    "max_seq_length": lambda m: m.max_seq_length,
    "modalities": lambda m: m.modalities,
    "model": lambda m: (m.model.config.num_labels, str(m.model.device), m.model.dtype == torch.float32),
    "model_card_data_class": lambda m: isinstance(m.model_card_data, m.model_card_data_class),
    "model_type": lambda m: m.model_type,
    "num_labels": lambda m: m.num_labels,
    "predict": lambda m: m.predict(PAIRS).round(4).tolist(),
    "processor": lambda m: len(m.processor),
    "rank": lambda m: [row["corpus_id"] for row in m.rank(QUERY, TEXTS)],
    "set_keep_in_fp32_modules": lambda m: m.set_keep_in_fp32_modules([]),
    "start_multi_process_pool": lambda _: True,
    "stop_multi_process_pool": lambda _: True,
    "supports": lambda m: [m.supports(kind) for kind in ("text", "message", "image")],
    "to": lambda m: (m.to("cpu") is m, m.to(torch.device("cpu")) is m, m.to(torch.float32) is m),
    "tokenizer": lambda m: m.tokenizer.tokenize(QUERY),
    "train": lambda m: m.train(False) is m,
    "transformers_model": lambda m: m.transformers_model.config.num_labels,
}
SINGULAR = [
    PAIRS,
    PAIRS[0],
    list(PAIRS[0]),
    [],
    np.array(PAIRS),
    np.array(PAIRS[0]),
    np.array([], str),
    np.array(PAIRS[0], object),
    [[{"role": "query", "content": "x"}]],
    [{"role": "query", "content": "x"}],
]
PUBLIC = sorted(name for name in dir(st.CrossEncoder) if not name.startswith("_"))


def test_the_tables_are_about_the_peers_class() -> None:
    assert not SAME.keys() & REFUSED.keys()
    assert (SAME.keys() | REFUSED.keys()) - set(PUBLIC) == set()
    assert set(PUBLIC) - SAME.keys() - REFUSED.keys() == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_works_or_is_refused_by_name(both: tuple[Any, CrossEncoder], name: str) -> None:
    theirs, ours = both
    if name in REFUSED:
        with pytest.raises(AttributeError, match=rf"CrossEncoder has no {name}, as fastrerank only runs models: \w+"):
            getattr(ours, name)
        assert not hasattr(ours, name)
        return
    assert hasattr(ours, name)
    assert SAME[name](ours) == SAME[name](theirs)


def test_refusals_say_what_does_it(both: tuple[Any, CrossEncoder]) -> None:
    for name, remedy in {
        "fit": "CrossEncoderTrainer",
        "old_fit": "fit",
        "push_to_hub": r"push_to_hub\(\) writes it",
        "save_pretrained": "sentence_transformers",
        "add_adapter": "peft",
        "preprocess": "tokenizer",
        "cuda": "device=",
        "parameters": "no torch modules",
    }.items():
        with pytest.raises(AttributeError, match=remedy):
            getattr(both[1], name)
    with pytest.raises(AttributeError, match="'CrossEncoder' object has no attribute 'nonsense'"):
        both[1].nonsense  # noqa: B018
    with pytest.raises(ValueError, match="CrossEncoderTrainer"):
        both[1].train()


def samples() -> list[dict[str, Any]]:
    texts = factory.texts(40, seed=3)
    return [{"query": texts[i], "positive": texts[i + 1 : i + 2], "documents": texts[i + 1 : i + 9]} for i in range(30)]


def evaluators(labels: int) -> list[Any]:
    pairs = [list(pair) for pair in PAIRS] + [[text, QUERY] for text in TEXTS]
    if labels > 1:
        return [
            evaluation.CrossEncoderClassificationEvaluator(pairs, [i % labels for i in range(len(pairs))], name="c")
        ]
    negative = [
        {"query": one["query"], "positive": one["positive"], "negative": one["documents"][1:]} for one in samples()
    ]
    return [
        evaluation.CrossEncoderClassificationEvaluator(pairs, [i % 2 for i in range(len(pairs))], name="c"),
        evaluation.CrossEncoderCorrelationEvaluator(pairs, [i / 30 for i in range(len(pairs))], name="s"),
        evaluation.CrossEncoderRerankingEvaluator(samples(), name="r"),
        evaluation.CrossEncoderRerankingEvaluator(negative, name="n", at_k=3),
    ]


@pytest.mark.parametrize("labels", [1, 3])
def test_evaluators_of_sentence_transformers(tiny: Tiny, labels: int, tmp_path: Path) -> None:
    theirs = st.CrossEncoder(str(tiny("bert", labels=labels)), device="cpu")
    ours = CrossEncoder(tiny("bert", labels=labels))
    for mine, other in zip(evaluators(labels), evaluators(labels), strict=True):
        found, expected = ours.evaluate(mine, tmp_path / "out"), theirs.evaluate(other, str(tmp_path / "their"))
        assert found == pytest.approx(expected, abs=1e-6)
        kept, wanted = ours.model_card_data.eval_results_dict[mine], theirs.model_card_data.eval_results_dict[other]
        assert kept == pytest.approx(wanted, abs=1e-6)
    assert any((tmp_path / "out").iterdir())
    card = st.cross_encoder.CrossEncoderModelCardData()
    given = CrossEncoder(tiny("bert", labels=labels), model_card_data=card)
    given.evaluate(evaluators(labels)[0])
    assert given.model_card_data is card
    assert len(card.eval_results_dict) == 1


def test_the_nano_beir_evaluator(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluation.CrossEncoderNanoBEIREvaluator.__new__(evaluation.CrossEncoderNanoBEIREvaluator)
    monkeypatch.setattr(
        type(made),
        "_load_dataset",
        lambda _, name, **__: evaluation.CrossEncoderRerankingEvaluator(samples(), name=f"Nano{name}_R100", at_k=10),
    )
    results = []
    for model in (CrossEncoder(tiny("bert")), st.CrossEncoder(str(tiny("bert")), device="cpu")):
        nano = evaluation.CrossEncoderNanoBEIREvaluator(["msmarco", "nq"])
        results.append(nano(model))
        assert model.model_card_data.eval_results_dict
    assert results[0] == pytest.approx(results[1], abs=1e-6)


# torch's activations that are made without arguments and keep the shape.
TORCH = sorted(
    name
    for name in torch.nn.modules.activation.__all__
    if name not in ("GLU", "MultiheadAttention", "PReLU", "Softmax2d", "Threshold")
)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", [*TORCH, "Identity"])
def test_saved_activations_equal_torch(name: str) -> None:
    if name == "RReLU":  # of random slopes, but for evaluation
        with pytest.raises(AssertionError):
            np.testing.assert_array_equal(
                *(activations.saved("rrelu", "x")(-np.ones((9, 9), np.float32)) for _ in "ab")
            )
        return
    function = activations.saved(name.lower(), "the checkpoint")
    random = np.random.default_rng(0)
    for shape in ((4001, 1), (500, 3)):
        x = (random.normal(size=shape) * 6).astype(np.float32)
        x[:12, 0] = [0, -0.0, 0.5, -0.5, 1, -1, 3, -3, 6, 88, -88, 21]
        with torch.inference_mode():
            expected = getattr(torch.nn, name)()(torch.from_numpy(x)).numpy().astype(np.float64)
        found = function(x)
        assert found.dtype == np.float32
        # Both round a handful of times: 4 units of the last place of the result; where terms of the input's size
        # cancel, of the input.
        cancels = name in ("GELU", "Mish", "Tanhshrink", "LogSoftmax", "SiLU", "Softmax", "Softmin")
        size = np.maximum(np.abs(expected), np.abs(x).max(axis=-1, keepdims=True) if cancels else 0)
        assert (np.abs(found - expected) <= 4 * np.finfo(np.float32).eps * size + 1e-38).all()


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", ["Softplus", "LogSigmoid", "GELU", "Softmax", "LogSoftmax", "RReLU"])
@pytest.mark.parametrize("labels", [1, 3])
def test_checkpoints_with_saved_activations(tiny: Tiny, tmp_path: Path, name: str, labels: int) -> None:
    if name == "RReLU" and labels == 3:
        pytest.skip("scores are random in training mode, which sentence-transformers leaves it in")
    saved = {"sentence_transformers": {"activation_fn": f"torch.nn.modules.activation.{name}"}}
    folder = copy_of(tiny("bert", labels=labels), tmp_path / "model", **saved)
    ours = CrossEncoder(folder)
    if name == "RReLU":
        assert ours.predict(PAIRS).shape == (len(PAIRS),)
        return
    expected = st.CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    assert np.abs(ours.predict(PAIRS) - expected).max() <= BOUND * max(1, np.abs(expected).max())


def test_settings_of_torch_modules_are_kept(both: tuple[Any, CrossEncoder]) -> None:
    for module in (
        torch.nn.Softplus(beta=3),
        torch.nn.LeakyReLU(0.5),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Hardtanh(-0.1, 0.2),
        torch.nn.ELU(0.3),
    ):
        expected = both[0].predict(PAIRS, activation_fn=module)
        assert np.abs(both[1].predict(PAIRS, activation_fn=module) - expected).max() <= BOUND
        plain = both[1].predict(PAIRS, activation_fn=type(module).__name__.lower())
        assert np.abs(plain - expected).max() > 1e-4


def test_what_is_saved_must_be_an_activation(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("torch.hub.load", "torch.nn.modules.activation.Threshold", "torch.nn.Linear")):
        saved: dict[str, Any] = {"sentence_transformers": {"activation_fn": name}}
        folder = copy_of(tiny("bert"), tmp_path / str(number), **saved)
        with pytest.raises(ValueError, match="not one that torch makes without arguments; pass activation_fn"):
            CrossEncoder(folder)
        assert CrossEncoder(folder, activation_fn="identity").num_labels == 1
    code = "import torch\nclass Half(torch.nn.Module):\n    def forward(self, x):\n        return torch.relu(x) / 2\n"
    (tmp_path / "activations_of_mine.py").write_text(code)
    folder = copy_of(
        tiny("bert"), tmp_path / "own", sentence_transformers={"activation_fn": "activations_of_mine.Half"}
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        CrossEncoder(folder)
    with pytest.raises(ImportError, match=r"'activations_of_mine\.Half' saved in .* cannot be imported"):
        CrossEncoder(folder, trust_remote_code=True)
    monkeypatch.syspath_prepend(tmp_path)
    ours = CrossEncoder(folder, trust_remote_code=True)
    expected = st.CrossEncoder(str(folder), device="cpu", trust_remote_code=True).predict(PAIRS)
    assert np.abs(ours.predict(PAIRS) - expected).max() <= BOUND
    np.testing.assert_allclose(ours.predict(PAIRS), np.maximum(ours.score(QUERY, TEXTS), 0) / 2, atol=1e-6)
    sys.modules.pop("activations_of_mine", None)


def test_devices_of_a_call(both: tuple[Any, CrossEncoder]) -> None:
    ours = both[1]
    expected = ours.predict(PAIRS)
    for device in ("cpu", ["cpu"], ["cpu"] * 3, torch.device("cpu"), [torch.device("cpu"), "cpu:0"]):
        np.testing.assert_array_equal(ours.predict(PAIRS, device=device, chunk_size=5), expected)
        assert ours.rank(QUERY, TEXTS, device=device) == ours.rank(QUERY, TEXTS)
    pool = ours.start_multi_process_pool(["cpu", "cpu"])
    np.testing.assert_array_equal(ours.predict(PAIRS, pool=pool), expected)
    for device in ("cuda", ["cpu", "cuda:1"], 0):
        with pytest.raises(ValueError, match="device must be None or 'cpu'"):
            ours.predict(PAIRS, device=device)
        with pytest.raises(ValueError, match="device must be None or 'cpu'"):
            ours.start_multi_process_pool(device)


def test_backends_are_accepted_with_a_warning(tiny: Tiny, both: tuple[Any, CrossEncoder]) -> None:
    for backend in ("onnx", "openvino"):
        with pytest.warns(UserWarning, match=f"backend '{backend}' is not used"):
            model = CrossEncoder(tiny("bert"), backend=backend)
        assert model.get_backend() == backend
        np.testing.assert_array_equal(model.predict(PAIRS), both[1].predict(PAIRS))
    assert CrossEncoder(tiny("bert"), backend="torch").get_backend() == "torch"
    with pytest.raises(ValueError, match="backend must be one of 'torch', 'onnx', 'openvino', got 'jax'"):
        CrossEncoder(tiny("bert"), backend="jax")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copies_share_weights_and_nothing_else(tiny: Tiny, how: Callable[[Any], Any]) -> None:
    model = CrossEncoder(tiny("bert"), prompts={"a": "what is "})
    made = how(model)
    assert made.engine is model.engine
    expected = model.predict(PAIRS)
    np.testing.assert_array_equal(made.predict(PAIRS), expected)
    made.max_length, made.activation_fn, made.default_prompt_name = 12, "identity", "a"
    made.prompts["b"] = "light "
    made.config.num_labels = 7
    made.model_card_data.set_evaluation_metrics("x", {})
    assert model.last_usage["forwards"] > 0
    np.testing.assert_array_equal(model.predict(PAIRS), expected)
    assert (model.max_length, model.config.num_labels, list(model.prompts)) == (factory.MAX_LENGTH, 1, ["a"])
    assert not model.model_card_data.eval_results_dict
    assert how(made).last_usage == {}


def test_pickles_load_the_checkpoint_anew(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CrossEncoder(tiny("bert"), dtype="bfloat16", prompts={"a": "x "}, token="secret-of-mine", num_threads=1)
    model.max_length, model.activation_fn = 60, torch.nn.Tanh()
    stored = pickle.dumps(model)
    assert len(stored) < 3000
    assert b"secret-of-mine" not in stored
    made = pickle.loads(stored)
    assert made.engine is not model.engine
    assert (made.num_labels, made.label, made.config.to_dict()) == (1, 0, model.config.to_dict())
    np.testing.assert_array_equal(made.predict(PAIRS), model.predict(PAIRS))
    monkeypatch.chdir(tiny("bert").parent)
    assert Path(pickle.loads(pickle.dumps(CrossEncoder(Path(tiny("bert").name)))).config.name_or_path).is_absolute()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model.activation_fn = "tanh"  # the child need not import torch
        found = [
            pool.apply_async(call, (model,))
            for call in (methodcaller("predict", PAIRS), repr, attrgetter("max_length", "dtype", "prompts"))
        ]
        scores, shown, settings = (one.get(timeout=120) for one in found)
    np.testing.assert_array_equal(scores, model.predict(PAIRS))
    assert (shown, settings) == (repr(model), (60, "bfloat16", {"a": "x "}))


@pytest.mark.parametrize("given", ["float32", torch.float32, np.float32, "torch.float32"])
def test_dtypes_may_be_torch_objects(tiny: Tiny, given: Any) -> None:
    vectors = fastrerank.EmbeddingReranker(tiny("bert"), dtype=given) if given == "float32" else None
    model = CrossEncoder(tiny("bert"), dtype=given, engine="native")
    assert model.dtype == torch.float32
    assert torch.float32 == model.dtype
    assert model.dtype != torch.bfloat16
    assert model.dtype in ("float32",)
    assert {model.dtype: 1} == {"float32": 1}
    assert repr(model.dtype) == "'float32'"
    assert vectors is None or vectors.dtype == torch.float32


def test_precisions_are_chosen_when_loading(tiny: Tiny, both: tuple[Any, CrossEncoder]) -> None:
    low = CrossEncoder(tiny("bert"), dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 != low.model.config
    assert low.bfloat16() is low.to(torch.bfloat16) is low
    assert both[1].float() is both[1]
    for model, call, dtype in (
        (low, "float", "float32"),
        (both[1], "bfloat16", "bfloat16"),
        (low, "half", "bfloat16"),
        (both[1], "double", "float32"),
    ):
        with pytest.raises(ValueError, match=rf"{call}\(\) cannot change weights that are packed as .*dtype='{dtype}'"):
            getattr(model, call)()
    with pytest.raises(ValueError, match=r"to\(\) cannot change weights"):
        low.to(torch.float32)
    half = CrossEncoder(tiny("bert"), dtype=torch.float16)
    assert half.half() is half
    with pytest.raises(ValueError, match=r"dtype must be one of 'auto', .*, got 'float64'"):
        CrossEncoder(tiny("bert"), dtype=torch.float64)
    for kind in ("late-interaction", "embedding"):
        assert fastrerank.load(tiny("bert"), kind, dtype=torch.bfloat16).dtype == torch.bfloat16  # type: ignore[attr-defined]


def test_lengths_that_sentence_transformers_takes(tiny: Tiny, both: tuple[Any, CrossEncoder]) -> None:
    theirs = st.CrossEncoder(str(tiny("bert")), device="cpu", max_length=4)
    ours = CrossEncoder(tiny("bert"), max_length=4)
    short = [("owl", "the owl sleeps"), ("a", "owl by day")]  # one token is left, and the document is longer
    assert np.abs(ours.predict(short) - theirs.predict(short)).max() <= BOUND
    assert ours.last_usage["query_truncated"]
    assert len(set(ours.predict([("where do cats sleep", text) for text in ("owl", "flea", "owl")]).tolist())) == 2
    assert ours.last_usage["query_truncated"]
    four = {"processing_kwargs": {"text": {"max_length": 4, "truncation": True}}}
    assert np.isfinite(both[1].predict(PAIRS, **four)).all()
    with pytest.raises(ValueError, match="max_length=3 leaves no room for text: it must be at least 4"):
        CrossEncoder(tiny("bert"), max_length=3).predict(PAIRS)
    for most in (factory.MAX_LENGTH + 1, 100_000):
        theirs = st.CrossEncoder(str(tiny("bert")), device="cpu", max_length=most)
        with pytest.warns(UserWarning, match=f"max_length={most} is more than the model's 160 positions"):
            ours = CrossEncoder(tiny("bert"), max_length=most)
        assert np.abs(ours.predict(PAIRS) - theirs.predict(PAIRS)).max() <= BOUND
        assert ours.max_length == factory.MAX_LENGTH
        assert np.isfinite(ours.predict((QUERY, "the owl hunts mice at night " * 90)))
        for change in (
            lambda m, n=most: setattr(m, "max_length", n),
            lambda m, n=most: m.predict(PAIRS, max_length=n),
            lambda m, n=most: setattr(m.tokenizer, "model_max_length", n),
        ):
            with pytest.warns(UserWarning, match="160 positions"):
                change(both[1])
    assert both[1].max_length == factory.MAX_LENGTH


# -- chat templates ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats._save(tmp_path_factory.mktemp("chat"), *chats.TEMPLATES["reranker"], 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats._save(tmp_path_factory.mktemp("parts"), *chats.TEMPLATES["parts"], 1)


def test_a_limit_below_the_template_cuts_the_prompts_end(reranker: Path) -> None:
    theirs, ours = chats.theirs_of(reranker), CrossEncoder(reranker)
    for limit in (3, 9, 31):
        text = {"processing_kwargs": {"text": {"max_length": limit}}}
        ours._chat._warned = False  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match=f"max_length={limit} leaves no room for texts .* at least 32"):
            scores = ours.predict(chats.PAIRS, **text)
        assert np.abs(scores - theirs.predict(chats.PAIRS, **text)).max() <= BOUND
        assert ours.last_usage["truncated"] == len(chats.PAIRS)
        with pytest.raises(TooLong, match="chat template"):
            ours.predict(chats.PAIRS, truncate=False, **text)


def messages(system: str = "", parts: bool = False) -> list[list[dict[str, Any]]]:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if parts else text

    first = [{"role": "system", "content": content(system)}] if system else []
    return [
        [*first, {"role": "query", "content": content(query)}, {"role": "document", "content": content(text)}]
        for query, text in chats.PAIRS
    ]


def test_pairs_as_chat_messages(reranker: Path, parts: Path, tiny: Tiny) -> None:
    for folder in (reranker, parts):
        theirs, ours = chats.theirs_of(folder), CrossEncoder(folder)
        style = folder == parts
        for given in (messages(parts=style), messages("Judge owls.", style)):
            expected = theirs.predict(given)
            chats.assert_equal(ours.predict(given), expected)
            assert abs(ours.predict(given[0]) - theirs.predict(given[0])) <= BOUND
            assert np.ndim(ours.predict(given[0])) == 0
        np.testing.assert_array_equal(ours.predict(messages()), ours.predict(chats.PAIRS))
        np.testing.assert_array_equal(ours.predict(messages(parts=True)), ours.predict(chats.PAIRS))
    ours = CrossEncoder(reranker)
    mixed = [messages("Judge owls.")[0], chats.PAIRS[1], messages()[2], messages("Judge owls.")[3]]
    expected = [ours.predict(one) for one in mixed]
    np.testing.assert_array_equal(ours.predict(mixed), expected)
    with_prompt = ours.predict(messages(), prompt="Judge owls.")
    np.testing.assert_array_equal(with_prompt, ours.predict(messages("Judge owls.")))
    with pytest.raises(ValueError, match="prompt and a system message say the same"):
        ours.predict(messages("Judge owls."), prompt="Judge cats.")
    for wrong in ([{"role": "user", "content": "x"}], messages()[0][::-1], messages()[0] * 2):
        with pytest.raises(ValueError, match=r"inputs\[1\] must be a pair, or messages of the roles 'query'"):
            ours.predict([messages()[0], wrong])
    with pytest.raises(TypeError, match=r"inputs\[0\]\['content'\] must be str"):
        ours.predict([{"role": "query", "content": 3}, {"role": "document", "content": "x"}])
    for model in (CrossEncoder(tiny("bert")), chats.theirs_of(tiny("bert"))):
        with pytest.raises(ValueError, match="message"):
            model.predict(messages())


def test_a_call_chooses_a_template_by_its_name(reranker: Path) -> None:
    # Several templates get their contents as parts.
    named = {
        "default": chats.INSTRUCT,
        "pairs": chats.ROLES.replace("CONTENT", "m.content[0].text"),
        "bare": "{{ messages[0].content[0].text }}\n{{ messages[1].content[0].text }}",
    }
    for given in ({"processor_kwargs": {"chat_template": named}}, {"chat_template": named}):
        ours = CrossEncoder(reranker, **given)
        theirs = chats.theirs_of(reranker, processor_kwargs={"chat_template": named})
        for model in (ours, theirs):
            with pytest.raises(ValueError, match="query"):
                model.predict(chats.PAIRS)
        with pytest.raises(ValueError, match=r"'default' cannot take .* chooses one of 'pairs', 'bare'"):
            ours.predict(chats.PAIRS)
        for name in ("pairs", "bare"):
            chosen = {"processing_kwargs": {"chat_template": {"chat_template": name}}}
            chats.assert_equal(ours.predict(chats.PAIRS[:4], **chosen), theirs.predict(chats.PAIRS[:4], **chosen))
    with pytest.raises(ValueError, match="chat_template must print the contents"):
        CrossEncoder(reranker, chat_template={"default": chats.INSTRUCT, "other": chats.INSTRUCT})
    joined = CrossEncoder(reranker, chat_template="")
    with pytest.warns(UserWarning, match=r"processing_kwargs\['chat_template'\] has no effect"):
        joined.predict(chats.PAIRS, processing_kwargs={"chat_template": {"chat_template": "pairs"}})


def language_model(folder: Path, chat: str | None) -> Path:
    prompt_tokenizers.save("qwen", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["yes", "no"])
    (folder / "chat_template.jinja").unlink()
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    name, settings = decoders._SETTINGS["qwen3"]
    settings = settings | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{name}Config")(**settings | {"max_position_embeddings": 600})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    decoders.randomise(model, 0).save_pretrained(folder)
    return folder


def test_language_models_that_answer_yes_or_no(tmp_path: Path) -> None:
    known = language_model(tmp_path / "Qwen3-Reranker-0.6B", chats.RERANKER)
    other = language_model(tmp_path / "Qwen3-0.6B", chats.RERANKER)
    cases: list[tuple[Path, dict[str, Any]]] = [
        (known, {}),
        (other, {"processor_kwargs": {"chat_template": chats.RERANKER}}),
    ]
    for folder, given in cases:
        ours, theirs = CrossEncoder(folder, **given), chats.theirs_of(folder, **given)
        expected = theirs.predict(chats.PAIRS, activation_fn=torch.nn.Identity())
        assert np.ptp(expected) > 0.1
        chats.assert_equal(ours.predict(chats.PAIRS, activation_fn="identity"), expected)
        chats.assert_equal(ours.predict(chats.PAIRS), theirs.predict(chats.PAIRS))
        assert ours.num_labels == theirs.num_labels == 1
        assert ours.last_usage["prefix_tokens"] > 0
        np.testing.assert_array_equal(copy.deepcopy(ours).predict(chats.PAIRS), ours.predict(chats.PAIRS))
    # Without a template for pairs, and by a name that says nothing, the peer scores what the model never saw.
    with pytest.raises(ValueError, match=r"load\(..., method='pointwise'\)"):
        CrossEncoder(other)
    plain = language_model(tmp_path / "plain" / "Qwen3-Reranker-0.6B", chats.INSTRUCT)
    with pytest.raises(ValueError, match=r"method='pointwise'\).*give one as chat_template="):
        CrossEncoder(plain)
    with pytest.raises(ValueError, match="cannot carry"):
        chats.theirs_of(plain).predict(chats.PAIRS)
