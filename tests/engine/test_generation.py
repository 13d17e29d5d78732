"""Generated text: batches against one prompt at a time, transformers' own loop, stops, seeds and probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastrerank.rerankers.generation import TransformersGenerator

Make = Callable[..., TransformersGenerator]
ALPHABET = [chr(i) for i in range(32, 127)]
END = len(ALPHABET)


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    messages: tuple[dict[str, str], ...] = ()


def save_tiny_llama(folder: Path, end: int | None = END, seed: int = 0) -> Path:
    """A random Llama over characters, so that any text can come out and be decoded exactly."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=END + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=END + 1,
        eos_token_id=end,
        pad_token_id=None,
        initializer_range=0.6,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*ALPHABET, "</s>", "<s>"])}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def stories() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}")
    return folder


@pytest.fixture(params=["llama", "stories"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def prompts(limit: int, count: int = 7, seed: int = 0) -> list[Prompt]:
    random = np.random.default_rng(seed)
    return [Prompt(random.integers(3, limit, size=random.integers(1, 40)).astype(np.int32)) for _ in range(count)]


def reference(folder: Path, prompt: Prompt, count: int) -> list[int]:
    """Greedy search by whole forwards, without cache, padding or `generate`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, end = prompt.ids.tolist(), model.generation_config.eos_token_id
    with torch.inference_mode():
        for _ in range(count):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == end:
                break
            ids.append(token)
    return ids[len(prompt.ids) :]


def test_batches_equal_one_at_a_time_and_plain_forwards(model: Path) -> None:
    some = prompts(90)
    generator = TransformersGenerator(model, max_new_tokens=24, batch_size=4, device="cpu")
    texts = generator.generate(some)
    assert texts == [generator([prompt])[0] for prompt in some]
    assert texts == [generator.engine.text(reference(model, prompt, 24)) for prompt in some]
    assert len(set(texts)) > 1
    assert generator.generate([]) == []


def test_sampling_depends_on_seed_and_prompt_alone(model: Path) -> None:
    some = prompts(90)
    make: Make = lambda **options: TransformersGenerator(  # noqa: E731
        model, max_new_tokens=16, temperature=1.5, top_p=0.9, device="cpu", **options
    )
    texts = make(seed=3).generate(some)
    generator = make(seed=3, batch_size=2)
    assert generator.generate(some) == texts
    assert generator.generate(some[::-1]) == texts[::-1]
    assert [generator([prompt])[0] for prompt in some] == texts
    assert make(seed=4).generate(some) != texts
    assert TransformersGenerator(model, max_new_tokens=16, device="cpu").generate(some) != texts


def test_sampling_draws_from_the_softmax(llama: Path) -> None:
    """First tokens of 4000 seeds against the model's probabilities at the temperature, cut at top_p."""
    (prompt,) = prompts(90, 1)
    temperature, top_p, draws = 2.0, 0.8, 4000
    generator = TransformersGenerator(llama, device="cpu")
    rows = [prompt.ids.tolist()] * 250
    counts = np.zeros(END + 2)
    for begin in range(0, draws, 250):
        seeds = list(range(begin, begin + 250))
        for tokens, _ in generator.engine.generate(rows, 1, temperature, top_p, seeds, (), 24):
            counts[tokens[0] if tokens else END] += 1
    with torch.inference_mode():
        logits = generator.engine.model(torch.tensor([rows[0]])).logits[0, -1].double().numpy()
    chances = np.exp((logits - logits.max()) / temperature)
    chances /= chances.sum()
    ordered = np.argsort(-chances, kind="stable")
    kept = ordered[: int(np.searchsorted(np.cumsum(chances[ordered]), top_p)) + 1]
    expected = np.zeros_like(chances)
    expected[kept] = chances[kept] / chances[kept].sum()
    assert counts[expected == 0].sum() == 0
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)) + 1).all()


def test_stop_strings_end_the_text_and_stay(model: Path) -> None:
    some = prompts(90)
    whole = TransformersGenerator(model, max_new_tokens=30, device="cpu").generate(some)
    longest = max(whole, key=len)
    stop = longest[len(longest) // 2 :][:3]
    generator = TransformersGenerator(model, max_new_tokens=30, stop=stop, device="cpu", batch_size=3)
    stopped = generator.generate(some)
    assert stopped == [generator([prompt])[0] for prompt in some]
    assert sum(stop in text for text in stopped) >= 1
    for text, full in zip(stopped, whole, strict=True):
        assert full.startswith(text)
        # The stop string ends within the last token.
        place = full.find(stop)
        assert text == full if place < 0 else place + len(stop) <= len(text) <= place + len(stop) + 8


def test_a_model_without_end_token_is_cut_at_the_stop(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, end=None, seed=1)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "</s>"', '"eos_token": null'))
    some = prompts(90)
    plain = TransformersGenerator(folder, max_new_tokens=20, device="cpu")
    assert plain.engine.ends == []
    whole = plain.generate(some)
    stop = whole[0][5:7]
    stopped = TransformersGenerator(folder, max_new_tokens=20, stop=[stop], device="cpu").generate(some)
    for text, full in zip(stopped, whole, strict=True):
        place = full.find(stop)
        assert text == (full if place < 0 else full[: place + len(stop)])


def test_probability_of_the_last_integer(llama: Path) -> None:
    """Against a forward over prompt and answer; the token that ends the integer is found again in the ids."""
    generator = TransformersGenerator(llama, max_new_tokens=40, temperature=3.0, device="cpu", batch_size=3)
    some = prompts(90, 8)
    texts, chances = generator.generate_scored(some)
    assert texts == generator.generate(some)
    found = 0
    for prompt, text, chance in zip(some, texts, chances, strict=True):
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        if not digits:
            assert np.isnan(chance)
            continue
        found += 1
        answer = [ALPHABET.index(c) for c in text]  # one token per character
        with torch.inference_mode():
            ids = torch.tensor([[*prompt.ids.tolist(), *answer]])
            logits = generator.engine.model(ids).logits[0].double()
        at = len(prompt.ids) + digits[-1] - 1
        assert chance == pytest.approx(float(logits[at].softmax(-1)[answer[digits[-1]]]), rel=1e-5)
    assert found >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"stop": [""]}, "stop must hold"),
        ({"dtype": "int8"}, "int8"),
        ({"device": ["cpu", "cpu"]}, "one device"),
    ],
)
def test_wrong_arguments_are_named(llama: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersGenerator(llama, **({"device": "cpu"} | options))


def test_prompts_must_leave_room(llama: Path) -> None:
    generator = TransformersGenerator(llama, max_new_tokens=200, device="cpu")
    with pytest.raises(ValueError, match=r"prompts\[1\] has 57 tokens.*256"):
        generator.generate([Prompt(np.ones(56, np.int32)), Prompt(np.ones(57, np.int32))])
    with pytest.raises(ValueError, match=r"prompts\[0\] has no tokens"):
        generator.generate([Prompt(np.zeros(0, np.int32))])


def test_damaged_logits_are_an_error(llama: Path) -> None:
    generator = TransformersGenerator(llama, max_new_tokens=2, device="cpu")
    with torch.no_grad():
        generator.engine.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        generator.generate(prompts(90, 1))


def test_a_model_without_language_model_head_is_refused(llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.model.save_pretrained(tmp_path)
    for file in llama.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"lack 'lm_head.weight'"):
        TransformersGenerator(tmp_path, device="cpu")
