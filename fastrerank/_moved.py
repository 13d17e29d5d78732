"""Earlier names of modules. They still import in this release, with a DeprecationWarning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["MOVED", "find_spec"]

_ROOT = "fastrerank."
# Earlier name -> present name, without `fastrerank.`.
MOVED = {
    "checkpoint": "checkpoints.checkpoint",
    "cli_eval": "cli.evaluate",
    "cli_index": "cli.index",
    "cli_score": "cli.score",
    "cli_shared": "cli.shared",
    "config_values": "checkpoints.config_values",
    "cur": "search",
    "cur.anchors": "search.anchors",
    "cur.build": "search.build",
    "cur.candidates": "search.candidates",
    "cur.checks": "search.checks",
    "cur.contents": "search.contents",
    "cur.files": "search.files",
    "cur.index": "search.index",
    "cur.loading": "search.loading",
    "cur.ridge": "search.ridge",
    "cur.search": "search.search",
    "cur.solver": "search.solver",
    "cur.store": "search.store",
    "cur.texts": "search.texts",
    "cur.tuning": "search.tuning",
    "datasets": "data.datasets",
    "doctor": "cli.doctor",
    "documents": "data.documents",
    "engine.attention_scorer": "engine.torch.attention",
    "engine.balance": "engine.native.int8_scaling",
    "engine.causal": "engine.torch.causal",
    "engine.cost": "engine.usage",
    "engine.cuda_graphs": "engine.torch.cuda_graphs",
    "engine.decoder": "engine.torch.decoder",
    "engine.generation": "engine.torch.generation",
    "engine.gpu_layers": "engine.torch.gpu_layers",
    "engine.label_encoder": "engine.torch.causal",
    "engine.layerwise": "engine.torch.layerwise",
    "engine.packing": "engine.batch",
    "engine.padded": "engine.torch.padded",
    "engine.placing": "engine.torch.placement",
    "engine.reading": "engine.readouts",
    "engine.row_norms": "engine.torch.row_norms",
    "engine.select": "engine.loading",
    "engine.seq2seq": "engine.torch.seq2seq",
    "engine.stored": "engine.expected_weights",
    "engine.torch_backbone": "engine.torch.backbone",
    "engine.torch_encoder": "engine.torch.encoder",
    "engine.torch_heads": "engine.torch.heads",
    "engine.torch_linear": "engine.torch.linear",
    "engine.torch_loading": "engine.torch.loading",
    "engine.torch_probe": "engine.torch.probe",
    "engine.upload": "engine.torch.placement",
    "explain": "rerankers.explain",
    "fingerprint": "runtime.fingerprint",
    "inputs.attention_policy": "inputs.prompts.attention_policy",
    "inputs.attention_prompts": "inputs.prompts.attention_prompts",
    "inputs.chat_pairs": "inputs.prompts.chat_pairs",
    "inputs.chat_rendering": "inputs.prompts.chat_rendering",
    "inputs.prompt_layout": "inputs.prompts.compiler",
    "inputs.prompt_tokenizer": "inputs.prompts.prompt_tokenizer",
    "inputs.template_layout": "inputs.prompts.template_layout",
    "inputs.token_cache": "inputs.prompts.token_cache",
    "integrations.pairs": "rerankers.pairs",
    "layouts": "checkpoints.layouts",
    "naming": "runtime.naming",
    "ops._cur": "ops._cur_topk.items",
    "ops._cur_cuda": "ops._cur_topk.cuda",
    "pair_files": "data.pair_files",
    "rerankers.lists": "rerankers.list_questions",
    "rerankers.permutation": "rerankers.ranking_parser",
    "serve.batcher": "serve.batching.batcher",
    "tensors": "checkpoints.tensors",
    "text": "inputs",
    "text.attention_policy": "inputs.prompts.attention_policy",
    "text.attention_prompts": "inputs.prompts.attention_prompts",
    "text.backend": "inputs.backend",
    "text.chat_pairs": "inputs.prompts.chat_pairs",
    "text.chat_rendering": "inputs.prompts.chat_rendering",
    "text.columns": "inputs.columns",
    "text.files": "inputs.files",
    "text.layout": "inputs.prompts.compiler",
    "text.limits": "inputs.limits",
    "text.prompt_tokenizer": "inputs.prompts.prompt_tokenizer",
    "text.prompts": "inputs.prompts",
    "text.runs": "inputs.text_pieces",
    "text.screening": "inputs.screening",
    "text.shapes": "inputs.prompts.template_layout",
    "text.token_cache": "inputs.prompts.token_cache",
    "text.tokenizer": "inputs.tokenizer",
    "text.windows": "inputs.windows",
    "types": "runtime.types",
    "weight_files": "checkpoints.weight_files",
}


class _Loader:
    """Returns the present module itself, never a copy."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        import importlib
        import warnings

        new = _ROOT + MOVED[spec.name[len(_ROOT) :]]
        warnings.warn(f"{spec.name} is now {new}; the next release removes the old name", DeprecationWarning, 2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__, module.__loader__ = module.__spec__.loader_state


def find_spec(name: str) -> ModuleSpec | None:
    """Return how an earlier name is loaded; None for every other name."""
    if name[len(_ROOT) :] not in MOVED:
        return None
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, _Loader())  # type: ignore[arg-type]
