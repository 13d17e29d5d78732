"""The engines of the attention comparison: one prompt as token ids in, masses of the documents' tokens out.

The rivals run the decoder's body without its head. Every engine reads a folder whose weights are stored in the
precision that it runs in; on a GPU they share a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bench.harness.engine import Engine

_MODEL = ("torch", "transformers", "transformers.models.qwen2.modeling_qwen2")


@dataclass(frozen=True)
class IcrPrompt:
    """A prompt: `context` (C,), then `tail` or `empty_tail`; `spans` (N, 2) of the documents in the context."""

    context: NDArray[np.int64]
    tail: NDArray[np.int64]
    empty_tail: NDArray[np.int64]
    spans: NDArray[np.int64]

    def head(self, count: int) -> IcrPrompt:
        """Equals the prompt with its first `count` documents; the engines are warmed by it."""
        end = int(self.spans[: max(1, count), 1].max())
        return replace(self, context=self.context[:end], spans=self.spans[: max(1, count)])

    @property
    def tokens(self) -> int:
        """Equals the tokens of the prompt with the query."""
        return len(self.context) + len(self.tail)


def random_prompt(context: int, vocabulary: int, seed: int = 0) -> IcrPrompt:
    """Equals a prompt of random tokens with documents of 100 tokens."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, vocabulary, context + 80)
    starts = np.arange(0, context - 99, 100)
    tails = np.concatenate([ids[context : context + 20], ids[context + 40 :]])
    spans = np.stack([starts, starts + 100], 1)
    return IcrPrompt(ids[:context], tails, ids[context : context + 30], spans)


def of_prompt(prompt: Any) -> IcrPrompt:
    """Equals an `AttentionPrompt`'s ids, its documents in the order in which they stand."""
    spans = prompt.spans[np.argsort(prompt.spans[:, 0])]
    return IcrPrompt(*(ids.astype(np.int64) for ids in (prompt.context, prompt.tail, prompt.empty_tail)), spans)


def core_heads(layers: int, heads: int) -> list[tuple[int, int]]:
    """Equals eight heads that lie where CoRe's lie in Llama-3.1-8B, by their share of the layers and heads."""
    published = ((13, 18), (13, 1), (14, 13), (13, 21), (14, 31), (13, 13), (8, 11), (14, 20))
    return sorted({(round(layer * layers / 32), head * heads // 32) for layer, head in published})


def document_scores(masses: NDArray[np.float64], prompt: IcrPrompt) -> NDArray[np.float64]:
    """Equals the filtered sums of masses that begin at the first document's first token."""
    from fastrerank.rerankers.attention import filtered_sum

    begin = int(prompt.spans[0, 0])
    return np.array([filtered_sum(masses[a - begin : b - begin].astype(np.float32)) for a, b in prompt.spans])


class IcrEngine(Engine):
    """`scores` returns the masses of the tokens from the first document's first to the last one's last."""

    package = "transformers"
    modules: ClassVar[tuple[str, ...]] = _MODEL
    device: ClassVar[str] = "cpu"
    reads: ClassVar[str] = "all"  # the heads whose masses come out: "all", "core" or "" (none: a floor)

    def spent(self) -> dict[str, int]:
        """Equals the tokens that passed in the last call."""
        return {"tokens": self.passed}


class FastRerank(IcrEngine):
    """Ours, all heads."""

    name, precision, package = "fastrerank-float32", "float32", "fastrerank"
    modules = (*_MODEL, "fastrerank.engine.torch.attention")
    setup = "AttentionScorer, all heads: one packed forward, no layer above the last one read"

    @classmethod
    def version(cls) -> str:
        import fastrerank

        return fastrerank.__version__

    def load(self) -> None:
        from fastrerank.checkpoints.checkpoint import open_checkpoint
        from fastrerank.engine.torch.attention import AttentionScorer

        checkpoint = open_checkpoint(self.checkpoint)
        config = checkpoint.config
        heads = core_heads(config["num_hidden_layers"], config["num_attention_heads"]) if self.reads == "core" else None
        self.scorer = AttentionScorer.load(checkpoint, heads, dtype=self.precision, num_threads=self.threads)

    def scores(self, prompt: Any) -> Any:
        masses, cost = self.scorer.masses(reading_of(prompt))
        self.passed = cost.tokens
        return masses


class FastRerankCore(FastRerank):
    """Ours with few heads."""

    name, reads = "fastrerank-core-float32", "core"
    setup = "the same with eight heads, the last in a layer below the middle"


class Eager(IcrEngine):
    """transformers' eager attention, materialised, in the published two passes, the second on the first's cache."""

    name, precision = "eager-float32", "float32"
    setup = "AutoModel, eager, output_attentions=True: prompt with N/A, then the query's rows on its keys and values"
    attention: ClassVar[str] = "eager"

    def load(self) -> None:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(self.threads)
        self._model = AutoModel.from_pretrained(
            self.checkpoint, dtype=getattr(torch, self.precision), attn_implementation=self.attention
        ).eval()

    def scores(self, prompt: Any) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        empty = self._pass(np.concatenate([prompt.context, prompt.empty_tail]), prompt, len(prompt.empty_tail), cache)
        cache.crop(-len(prompt.empty_tail))
        masses = self._pass(prompt.tail, prompt, len(prompt.tail), cache) - empty
        self.passed = prompt.tokens + len(prompt.empty_tail)
        return masses.cpu().numpy()

    def _pass(self, ids: NDArray[np.int64], prompt: IcrPrompt, rows: int, cache: Any) -> Any:
        """Sum over heads of the mean over the last `rows` rows."""
        import torch

        begin, end = int(prompt.spans[0, 0]), int(prompt.spans[-1, 1])
        with torch.inference_mode():
            tensor = torch.from_numpy(ids)[None].to(self._model.device)
            attentions = self._model(tensor, past_key_values=cache, output_attentions=True).attentions
            return sum(a[0, :, -rows:, begin:end].double().mean(1).sum(0) for a in attentions)


class TwoPass(Eager):
    """The published scheme without what a library can save: SDPA, and the last rows' attention recomputed per layer."""

    name, attention = "two-pass-float32", "bench-two-pass"
    setup = "AutoModel, SDPA, two passes over one cache; the read rows' attention recomputed in float32, layer by layer"

    def load(self) -> None:
        register_two_pass()
        super().load()

    def _pass(self, ids: NDArray[np.int64], prompt: IcrPrompt, rows: int, cache: Any) -> Any:
        import torch

        with torch.inference_mode():
            tensor = torch.from_numpy(ids)[None].to(self._model.device)
            with ReadingRows(rows, int(prompt.spans[0, 0]), int(prompt.spans[-1, 1])) as found:
                self._model(tensor, past_key_values=cache)
        return sum(found)


class Forward(Eager):
    """A plain forward of the prompt with the query: nothing is read."""

    name, reads, attention = "forward-float32", "", "sdpa"
    setup = "AutoModel, SDPA, use_cache=False: the prompt alone, nothing is read"

    def scores(self, prompt: Any) -> Any:
        import torch

        ids = np.concatenate([prompt.context, prompt.tail])
        with torch.inference_mode():
            states = self._model(torch.from_numpy(ids)[None].to(self._model.device), use_cache=False)[0]
        self.passed = len(ids)
        return states[0, :1, 0].float().cpu().numpy()


class Reference(Eager):
    """The yardstick: eager, in float32 or float64, one prompt alone in each pass."""

    name = "reference-float32"
    setup = "transformers eager, float32"


class Reference64(Reference):
    name, precision = "reference-float64", "float64"


def reading_of(prompt: IcrPrompt) -> Any:
    """Equals the prompt as `AttentionScorer.masses` takes it."""
    from fastrerank.engine.readouts import Reading

    begin, end = int(prompt.spans[0, 0]), int(prompt.spans[-1, 1])
    return Reading.of(prompt.context, prompt.tail, prompt.empty_tail, begin, end)


_reading: list[Any] = []


class ReadingRows:
    """While it lasts, attention "bench-two-pass" appends each layer's masses of the keys [begin, end) to a list."""

    def __init__(self, rows: int, begin: int, end: int) -> None:
        self.state = (rows, begin, end, [])

    def __enter__(self) -> list[Any]:
        _reading.append(self.state)
        return self.state[3]

    def __exit__(self, *_: object) -> None:
        _reading.pop()


def register_two_pass() -> None:
    """Registers the attention that answers by SDPA and recomputes the last rows' attention."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **others: Any) -> Any:
        result = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **others)
        if _reading:
            rows, begin, end, found = _reading[-1]
            groups, size = key.shape[1], query.shape[-1]
            last = query[0, :, -rows:].float().reshape(groups, -1, size)  # query heads of a key head, one after another
            scores = (last @ key[0].float().transpose(1, 2)).view(query.shape[1], rows, -1)
            scores *= size**-0.5 if scaling is None else scaling
            count = scores.shape[-1]
            hidden = (
                torch.arange(count, device=query.device)
                > torch.arange(count - rows, count, device=query.device)[:, None]
            )
            found.append(scores.masked_fill_(hidden, float("-inf")).softmax(-1)[:, :, begin:end].mean(1).sum(0))
        return result

    AttentionInterface.register("bench-two-pass", attend)
    AttentionMaskInterface.register("bench-two-pass", sdpa_mask)


def _bfloat16(kind: type[Engine]) -> type[Engine]:
    name = kind.name.replace("float32", "bfloat16")
    return type(f"{kind.__name__}Bfloat16", (kind,), {"name": name, "precision": "bfloat16"})


# The first one of a precision is its yardstick: in bfloat16 the others may err twice as much.
_FLOAT32: tuple[type[Engine], ...] = (Eager, TwoPass, Forward, FastRerank, FastRerankCore)
BY_DTYPE: dict[str, tuple[type[Engine], ...]] = {
    "float32": _FLOAT32,
    "bfloat16": tuple(_bfloat16(kind) for kind in _FLOAT32),
}
_YARDSTICKS: tuple[type[Engine], ...] = (Reference, Reference64)
ENGINES: dict[str, type[Engine]] = {
    f"icr/{kind.name}": kind for kinds in (*BY_DTYPE.values(), _YARDSTICKS) for kind in kinds
}


def increments(peaks: list[tuple[int, int]]) -> list[float]:
    """Equals the bytes per token between neighbours of (tokens, bytes)."""
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(peaks)]
