"""What all rerankers with a language model share: a checkpoint, a prompt template, and logits of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.loading import plan
from fastrerank.engine.usage import Cost
from fastrerank.inputs.prompts import Template, list_templates
from fastrerank.inputs.prompts.prompt_tokenizer import Prompt, PromptTokenizer
from fastrerank.rerankers.base import Reranker, Usage
from fastrerank.rerankers.call import LIMITS, CallOptions
from fastrerank.rerankers.recognise import recognised_template
from fastrerank.runtime.types import DeviceLike, DtypeLike

__all__ = ["LLMReranker", "Scorer"]

_SEQ2SEQ = ("t5", "mt5", "umt5", "longt5")


class Scorer(Protocol):
    """A model that is asked for logits of labels at the end of prompts: `CausalScorer`, `Seq2SeqScorer`."""

    @property
    def max_length(self) -> int | None:
        """Tokens of a prompt that the model's positions allow."""

    def label_logits(
        self, prompts: Sequence[npt.NDArray[np.integer]], labels: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.float32], Cost]:
        """Return float32 (N, K) and what it cost."""


class LLMReranker(Reranker):
    """A language model behind a prompt template; its subclasses are schedules and formulas.

    Args:
        model: hub id or local folder of a causal, sequence-to-sequence or sequence classification checkpoint.
        template: a name of `list_templates()` or a path to a TOML file; None: the one that the checkpoint was trained
            with, where it can be recognised, else the method's own.
        instruction: replaces the template's.
        device: "cpu", "cuda", "cuda:1"; None: a usable GPU, else the CPU.
        dtype: "float32", "bfloat16" or "float16" for the backbone; "auto": float32 on a CPU, bfloat16 on a GPU. Final
            norm, label rows and logits are float32 in all of them.
        max_length: tokens per prompt; None for the smaller of the template's and the checkpoint's limit. Documents are
            cut to fit, never the query or what follows the documents. `last_usage` tells what was cut.
        num_threads: CPU threads of a call; None for torch's own setting.
        memory_limit: bytes, or a fraction of the device's memory, that the process may come to; None for 0.9.
        share_prefixes: whether what the prompts of a call begin with alike passes through the network once.
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.

    Raises ValueError for a checkpoint that lacks the head, that the template cannot serve, or whose chat template drops
    a part of the prompt; ImportError without torch and transformers.
    """

    call_options: ClassVar[frozenset[str]] = frozenset({"instruction"}) | LIMITS
    kind: ClassVar[str]
    default_template: ClassVar[str]
    default_seq2seq: ClassVar[str]  # the default for encoder-decoders

    def __init__(
        self,
        model: str | Path,
        *,
        template: str | Path | None = None,
        instruction: str | None = None,
        device: DeviceLike | None = None,
        dtype: DtypeLike = "auto",
        max_length: int | None = None,
        num_threads: int | None = None,
        memory_limit: float | None = None,
        share_prefixes: bool = True,
        trust_remote_code: bool = False,
        revision: str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
    ) -> None:
        super().__init__()
        checkpoint = open_checkpoint(
            model,
            revision=revision,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        self.checkpoint, self.instruction = checkpoint, instruction
        self.template = self._template(checkpoint, template)
        chosen = plan(checkpoint.config, "torch", device, dtype)
        if len(chosen.devices) != 1:
            raise ValueError(f"device must be one device for a language model, got {device!r}")
        self.device, self.dtype = chosen.devices[0], chosen.dtype
        self.prompts = PromptTokenizer.load(
            checkpoint.transformer_path,
            self.template,
            max_length=self._limit(checkpoint, max_length),
            instruction=instruction,
            trust_remote_code=trust_remote_code,
        )
        self.scorer: Scorer = self._scorer(
            checkpoint,
            dtype=self.dtype,
            device=self.device,
            num_threads=num_threads,
            memory_limit=memory_limit,
            share_prefixes=share_prefixes,
        )

    @property
    def honoured_options(self) -> frozenset[str]:
        """`call_options`, without `instruction` where the template prints none."""
        return self.call_options - (frozenset() if self.template.uses_instruction else {"instruction"})

    def _template(self, checkpoint: Checkpoint, wanted: str | Path | None) -> Template:
        usual = self.default_seq2seq if _seq2seq(checkpoint) else self.default_template
        template = Template.load(wanted or recognised_template(checkpoint, self.kind) or usual)
        if template.kind != self.kind:
            known = ", ".join(sorted(list_templates(self.kind)))
            raise ValueError(
                f"template {template.name!r} is {template.kind}, {type(self).__name__} takes {self.kind} ones: {known}"
            )
        return template

    def _limit(self, checkpoint: Checkpoint, max_length: int | None) -> int | None:  # noqa: ARG002
        """The limit of a prompt in tokens, for methods that need room behind it."""
        return max_length

    def _scorer(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        device: str,
        num_threads: int | None,
        memory_limit: float | None,
        share_prefixes: bool,
    ) -> Scorer:
        seq2seq = _seq2seq(checkpoint)
        if seq2seq != (self.template.model == "seq2seq"):
            what = "an encoder-decoder" if seq2seq else "no encoder-decoder"
            raise ValueError(
                f"{checkpoint.path} is {what} ({checkpoint.config.get('model_type')}), template "
                f"{self.template.name!r} is for {'encoder-decoders' if not seq2seq else 'decoders'}"
            )
        if seq2seq:
            from fastrerank.engine.torch.seq2seq import Seq2SeqScorer

            return Seq2SeqScorer.load(
                checkpoint,
                dtype=dtype,
                device=device,
                num_threads=num_threads,
                memory_limit=memory_limit,
                decoder_prefix=self.prompts.decoder_ids.tolist(),
            )
        from fastrerank.engine.torch.causal import CausalScorer

        architectures = checkpoint.config.get("architectures") or []
        classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
        return CausalScorer.load(
            checkpoint,
            dtype=dtype,
            device=device,
            num_threads=num_threads,
            memory_limit=memory_limit,
            share_prefixes=share_prefixes,
            head="classification" if classifier else "causal",
        )

    def check_options(self, **options: Any) -> CallOptions:
        """Return the options of a call, checked as `score` checks them; see `Reranker.check_options`.

        Raises ValueError also for an instruction where the template prints none.
        """
        call = super().check_options(**options)
        self.prompts.with_instruction(call.instruction)
        return call

    def _logits(
        self, prompts: Sequence[Prompt], labels: npt.NDArray[np.integer], usage: Usage
    ) -> npt.NDArray[np.float32]:
        """Return float32 (N, K) logits of the labels after each prompt, and count what they cost."""
        usage.truncated += sum(int(prompt.truncated.sum()) for prompt in prompts)
        with usage.stage("compute"):
            logits, cost = self.scorer.label_logits([prompt.ids for prompt in prompts], labels)
        usage.add(cost)
        return logits


def _seq2seq(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") in _SEQ2SEQ
