"""The engines of the LLM comparison on a CPU: prompts as token ids in, logit(yes) - logit(no) out.

Rivals get length-sorted, left-padded batches without a key-value cache, the head at the last position only, and the
quickest batch size of 4 to 32. Every engine reads a folder whose weights are stored in the precision that it runs in.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bench.harness.data import Pairs
from bench.harness.engine import BATCHES, Engine, Ids, PaddedEngine, Scores

_MODEL = ("torch", "transformers", "transformers.models.qwen3.modeling_qwen3")


class FastRerank(Engine):
    """Ours: `CausalScorer` on token ids."""

    name, precision, package = "fastrerank-float32", "float32", "fastrerank"
    modules = (*_MODEL, "fastrerank.engine.torch.causal")
    setup = "CausalScorer, packed prompts, common prefixes once"
    shares: ClassVar[bool] = True

    @classmethod
    def version(cls) -> str:
        import fastrerank

        return fastrerank.__version__

    def load(self) -> None:
        from fastrerank.checkpoints.checkpoint import open_checkpoint
        from fastrerank.engine.torch.causal import CausalScorer

        self._labels = labels_of(self)
        self.scorer = CausalScorer.load(
            open_checkpoint(self.checkpoint),
            dtype=self.precision,
            num_threads=self.threads,
            share_prefixes=self.shares,
        )

    def scores(self, pairs: Pairs) -> Scores:
        logits, self.cost = self.scorer.label_logits(pairs.ids, self._labels)
        difference: Scores = logits[:, 0] - logits[:, 1]
        return difference

    def spent(self) -> dict[str, int]:
        """Equals what the last `scores` cost."""
        return dict(vars(self.cost))


class FastRerankUnshared(FastRerank):
    name, shares = "fastrerank-unshared-float32", False
    setup = "the same, every prompt on its own"


class Transformers(PaddedEngine):
    """transformers' best simple way."""

    name, precision, package = "transformers-float32", "float32", "transformers"
    modules: ClassVar[tuple[str, ...]] = _MODEL
    setup = "AutoModelForCausalLM, length-sorted left-padded batches, logits_to_keep=1, use_cache=False, SDPA"
    attention: ClassVar[str] = "sdpa"

    def load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        self._labels = labels_of(self)
        self._model = AutoModelForCausalLM.from_pretrained(
            self.checkpoint, dtype=getattr(torch, self.precision), attn_implementation=self.attention
        ).eval()

    def _pad(self, pairs: Pairs, rows: NDArray[np.intp]) -> dict[str, Ids]:
        return left_padded([pairs.ids[row] for row in rows])

    def _run(self, batches: list[dict[str, Ids]]) -> list[Scores]:
        import torch

        found = []
        with torch.inference_mode():
            for batch in batches:
                tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
                logits = self._model(**tensors, logits_to_keep=1, use_cache=False).logits[:, -1]
                yes, no = (logits[:, label].double() for label in self._labels)
                found.append((yes - no).numpy())
        return found


class SentenceTransformers(Engine):
    """CrossEncoder.predict on texts: its Transformer and LogitScore modules behind the folder's chat template."""

    name, precision, package = "sentence-transformers-float32", "float32", "sentence-transformers"
    modules = (*_MODEL, "sentence_transformers", "sentence_transformers.cross_encoder")
    setup = "CrossEncoder.predict on texts (Transformer and LogitScore modules), SDPA; includes tokenising"
    settings = tuple({"batch": batch} for batch in BATCHES)
    on_text = True
    batch = 8

    def load(self) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        torch.set_num_threads(self.threads)
        kwargs = {"dtype": getattr(torch, self.precision), "attn_implementation": "sdpa"}
        self._model = CrossEncoder(
            str(self.checkpoint), device="cpu", activation_fn=torch.nn.Identity(), model_kwargs=kwargs
        )

    def use(self, setting: dict[str, Any]) -> None:
        self.batch = setting["batch"]

    def scores(self, pairs: Pairs) -> Scores:
        texts = [(pairs.query, document) for document in pairs.documents]
        logits: Scores = self._model.predict(texts, batch_size=self.batch, show_progress_bar=False)
        return logits

    def tokenise(self, pairs: Pairs) -> None:
        tokenise_as_predict(self._model, pairs, self.batch)


class Reference(Transformers):
    """The yardstick of the check: transformers eager, one prompt at a time (no padding), in float32 or float64."""

    name, attention, settings, batch = "llm-reference-float32", "eager", (), 1
    setup = "transformers eager, one prompt at a time"


class Reference64(Reference):
    name, precision = "llm-reference-float64", "float64"


def labels_of(engine: Engine) -> NDArray[np.int64]:
    """Equals the ids of yes and no that the folder's LogitScore module names."""
    stored = json.loads((engine.checkpoint / "1_LogitScore" / "config.json").read_text())
    return np.array([stored["true_token_id"], stored["false_token_id"]], np.int64)


def left_padded(rows: list[NDArray[np.int32]]) -> dict[str, Ids]:
    """Equals int64 input_ids and attention_mask (B, longest) with the prompts at the right."""
    width = max(map(len, rows))
    inputs = {name: np.zeros((len(rows), width), np.int64) for name in ("input_ids", "attention_mask")}
    for line, ids in enumerate(rows):
        inputs["input_ids"][line, width - len(ids) :] = ids
        inputs["attention_mask"][line, width - len(ids) :] = 1
    return inputs


def tokenise_as_predict(model: Any, pairs: Pairs, batch: int) -> None:
    """Does to texts what `CrossEncoder.predict` does before the model.

    Raises
    ------
    RuntimeError: the ids are not those of `pairs`, so that the engines would not score the same prompts.
    """
    order = sorted(range(len(pairs.documents)), key=lambda i: -len(pairs.documents[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = model.preprocess([(pairs.query, pairs.documents[i]) for i in rows])
        expected = left_padded([pairs.ids[i] for i in rows])
        mask = np.asarray(inputs["attention_mask"], bool)
        same = np.array_equal(mask, expected["attention_mask"].astype(bool))
        if not same or not np.array_equal(np.asarray(inputs["input_ids"])[mask], expected["input_ids"][mask]):
            raise RuntimeError("sentence-transformers renders other prompts than the other engines get")


def _bfloat16(kind: type[Engine]) -> type[Engine]:
    name = kind.name.replace("float32", "bfloat16")
    return type(f"{kind.__name__}Bfloat16", (kind,), {"name": name, "precision": "bfloat16"})


# The first one of a precision is its yardstick: in bfloat16 the others may err twice as much.
_FLOAT32: tuple[type[Engine], ...] = (Transformers, SentenceTransformers, FastRerank, FastRerankUnshared)
BY_DTYPE: dict[str, tuple[type[Engine], ...]] = {
    "float32": _FLOAT32,
    "bfloat16": tuple(_bfloat16(kind) for kind in _FLOAT32),
}
_YARDSTICKS: tuple[type[Engine], ...] = (Reference, Reference64)
ENGINES: dict[str, type[Engine]] = {
    f"llm/{kind.name}": kind for kinds in (*BY_DTYPE.values(), _YARDSTICKS) for kind in kinds
}
