"""The engines of the comparison: ours and every rival.

An engine that needs a converted checkpoint writes it once in `convert` (in a process of its own, so that the
converter's memory is not the engine's); `load` then reads it as a user would. All rivals get length-sorted batches, the
machine's cores, and the setting out of `settings` that is quickest on the measured pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.harness.data import Pairs
from bench.harness.engine import BATCHES, Engine, Ids, PaddedEngine, Scores, config_of


class Torch(PaddedEngine):
    """transformers on torch, its default attention."""

    name, precision, package = "torch-fp32", "float32", "torch"
    modules: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    setup = "transformers' model, padded length-sorted batches, inference mode"
    dtype = "float32"

    def load(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(self.threads)
        dtype = getattr(torch, self.dtype)
        self._model = AutoModelForSequenceClassification.from_pretrained(self.checkpoint, dtype=dtype).eval()

    def _run(self, batches: list[dict[str, Ids]]) -> list[Scores]:
        import torch

        with torch.inference_mode():
            tensors = ({name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches)
            return [self._model(**inputs).logits[:, 0].float().numpy() for inputs in tensors]


class TorchBfloat16(Torch):
    name, precision, dtype = "torch-bf16", "bfloat16", "bfloat16"


class SentenceTransformersModel(Torch):
    """The model inside sentence-transformers' CrossEncoder, given ids: its default batch of 32, without tokenising."""

    name, package = "sentence-transformers-ids", "sentence-transformers"
    modules = ("sentence_transformers", "torch", "transformers")
    setup = "the model inside CrossEncoder on ready ids, batch 32 (its default)"
    settings, batch = (), 32

    def load(self) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        torch.set_num_threads(self.threads)
        self._model = CrossEncoder(str(self.checkpoint), device="cpu")[0].model


class SentenceTransformers(Engine):
    """CrossEncoder.predict as its documentation shows it: texts in, batch 32, float32."""

    name, precision, package = "sentence-transformers", "float32", "sentence-transformers"
    modules = ("sentence_transformers", "torch")
    setup = "CrossEncoder.predict on texts with its defaults (batch 32); includes tokenising"
    on_text = True

    def load(self) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        torch.set_num_threads(self.threads)
        # Identity, so that the check compares logits; the default sigmoid costs the same.
        self._model = CrossEncoder(str(self.checkpoint), device="cpu", activation_fn=torch.nn.Identity())

    def scores(self, pairs: Pairs) -> Scores:
        logits: Scores = self._model.predict([(pairs.query, document) for document in pairs.documents])
        return logits

    def rank(self, query: str, documents: list[str]) -> list[tuple[int, float]]:
        return [(row["corpus_id"], row["score"]) for row in self._model.rank(query, documents)]

    def tokenise(self, pairs: Pairs) -> None:
        """Tokenises and pads as `predict` does, batch by batch, and throws the result away."""
        inputs = [(pairs.query, document) for document in sorted(pairs.documents, key=len, reverse=True)]
        for start in range(0, len(inputs), 32):
            self._model.preprocess(inputs[start : start + 32])


class OnnxRuntime(PaddedEngine):
    name, precision, package = "onnxruntime-fp32", "float32", "onnxruntime"
    modules = ("onnxruntime", "onnx", "torch", "transformers")
    setup = "exported with eager attention, fused by onnxruntime.transformers.optimizer (model_type bert)"
    file = "fused.onnx"

    def convert(self) -> None:
        _convert_onnx(self.checkpoint, self._artefacts)

    @property
    def _artefacts(self) -> Path:
        return self._folder("onnx", "torch", "onnxruntime")

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        path = str(self._artefacts / self.file)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = {tensor.name for tensor in self._session.get_inputs()}

    def _run(self, batches: list[dict[str, Ids]]) -> list[Scores]:
        feeds = ({name: array for name, array in batch.items() if name in self._inputs} for batch in batches)
        return [self._session.run(["logits"], feed)[0][:, 0] for feed in feeds]


class OnnxRuntimeInt8(OnnxRuntime):
    name, precision, file = "onnxruntime-int8", "int8", "int8.onnx"
    setup = OnnxRuntime.setup + ", then quantize_dynamic(QInt8, per_channel)"


class OpenVino(PaddedEngine):
    name, precision, package = "openvino-fp32", "float32", "openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxruntime", "torch", "transformers")
    setup = "the plain ONNX export; best of latency mode (all threads on one batch) and one stream per thread"
    hint: ClassVar[str | None] = "f32"
    settings = (
        *({"batch": batch, "streams": "one"} for batch in BATCHES),
        *({"batch": batch, "streams": "threads"} for batch in BATCHES[:2]),
    )

    def convert(self) -> None:
        _convert_onnx(self.checkpoint, self._folder("onnx", "torch", "onnxruntime"))

    def load(self) -> None:
        import openvino

        self._core = openvino.Core()
        self._model = self._core.read_model(self._source())
        self._compiled: dict[str, Any] = {}
        self.use({"batch": 8, "streams": "one"})

    def use(self, setting: dict[str, Any]) -> None:
        import openvino

        super().use(setting)
        streams = setting["streams"]
        if streams not in self._compiled:
            properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}
            if self.hint is not None:
                properties["INFERENCE_PRECISION_HINT"] = self.hint
            if streams == "threads":
                properties |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": self.threads}
            self._compiled = {streams: self._core.compile_model(self._model, "CPU", properties)}
            self._queue = openvino.AsyncInferQueue(self._compiled[streams], 1 if streams == "one" else self.threads)
            self._queue.set_callback(self._collect)
        self._inputs = {tensor.get_any_name() for tensor in self._compiled[streams].inputs}

    def _source(self) -> Path:
        return self._folder("onnx", "torch", "onnxruntime") / "plain.onnx"

    def _run(self, batches: list[dict[str, Ids]]) -> list[Scores]:
        self._done: dict[int, Scores] = {}
        for index, batch in enumerate(batches):
            feed = {name: array for name, array in batch.items() if name in self._inputs}
            self._queue.start_async(feed, userdata=index)
        self._queue.wait_all()
        return [self._done[index] for index in range(len(batches))]

    def _collect(self, request: Any, index: int) -> None:
        self._done[index] = request.get_output_tensor(0).data[:, 0].copy()


class OpenVinoBfloat16(OpenVino):
    name, precision, hint = "openvino-bf16", "bfloat16", "bf16"


class OpenVinoInt8(OpenVino):
    # No hint: what stays float then runs in OpenVINO's default, bfloat16 where the CPU has it.
    name, precision, hint, calibrated = "openvino-int8", "int8", None, True
    modules = (*OpenVino.modules, "nncf")
    setup = "nncf.quantize(model_type=TRANSFORMER), calibrated on 300 pairs of other queries; latency mode or streams"

    def convert(self) -> None:
        super().convert()
        if self._source().exists():
            return
        import nncf
        import openvino

        model = openvino.Core().read_model(super()._source())
        inputs = {tensor.get_any_name() for tensor in model.inputs}
        singles = [self._pad(pairs, np.array([row])) for pairs in self.calibration for row in range(len(pairs.ids))]
        samples = [{name: array for name, array in single.items() if name in inputs} for single in singles]
        quantized = nncf.quantize(
            model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
        self._source().parent.mkdir(parents=True, exist_ok=True)
        draft = self._source().with_name("draft.xml")
        openvino.save_model(quantized, draft, compress_to_fp16=False)
        draft.with_suffix(".bin").rename(self._source().with_suffix(".bin"))
        draft.rename(self._source())

    def _source(self) -> Path:
        return self._folder("openvino-int8", "torch", "openvino", "nncf") / "model.xml"


class CTranslate2(PaddedEngine):
    """The body runs in CTranslate2, the head in numpy on the first token (or its pooled output)."""

    name, precision, package = "ctranslate2-fp32", "float32", "ctranslate2"
    modules = ("ctranslate2", "torch", "transformers")
    setup = "TransformersConverter, Encoder.forward_batch; classification head in numpy"
    compute = "float32"

    @property
    def _artefacts(self) -> Path:
        return self._folder("ctranslate2", "ctranslate2", "transformers")

    def convert(self) -> None:
        if not self._artefacts.exists():
            from ctranslate2.converters import TransformersConverter

            draft = self._artefacts.with_name("draft-ctranslate2")
            TransformersConverter(str(self.checkpoint)).convert(str(draft), force=True)
            draft.rename(self._artefacts)

    def load(self) -> None:
        import ctranslate2
        from safetensors.numpy import load_file

        self._encoder = ctranslate2.Encoder(
            str(self._artefacts), compute_type=self.compute, intra_threads=self.threads, inter_threads=1
        )
        weights = load_file(self.checkpoint / "model.safetensors")
        self._head = {key: value for key, value in weights.items() if key.startswith("classifier.")}

    def _run(self, batches: list[dict[str, Ids]]) -> list[Scores]:
        return [self._logits(batch) for batch in batches]

    def _logits(self, batch: dict[str, Ids]) -> Scores:
        import ctranslate2

        view = ctranslate2.StorageView.from_array
        out = self._encoder.forward_batch(
            view(batch["input_ids"].astype(np.int32)),
            view(batch["attention_mask"].sum(1).astype(np.int32)),
            token_type_ids=batch["token_type_ids"].tolist(),
        )
        head = self._head
        if "classifier.out_proj.weight" in head:
            first = np.asarray(out.last_hidden_state)[:, 0]
            pooled = np.tanh(first @ head["classifier.dense.weight"].T + head["classifier.dense.bias"])
            weight, bias = head["classifier.out_proj.weight"], head["classifier.out_proj.bias"]
        else:
            pooled = np.asarray(out.pooler_output)
            weight, bias = head["classifier.weight"], head["classifier.bias"]
        logits: Scores = (pooled @ weight.T + bias)[:, 0]
        return logits


class CTranslate2Int8(CTranslate2):
    name, precision, compute = "ctranslate2-int8", "int8", "int8"


class FastRerank(Engine):
    """Ours, through the public CrossEncoder; ids go straight to its engine."""

    name, precision, package, modules = "fastrerank-float32", "float32", "fastrerank", ("fastrerank",)
    setup = "CrossEncoder(dtype=..., num_threads=...), no batch size to choose"

    @classmethod
    def version(cls) -> str:
        import fastrerank

        return fastrerank.__version__

    def load(self) -> None:
        import fastrerank

        self._model = fastrerank.CrossEncoder(str(self.checkpoint), dtype=self.precision, num_threads=self.threads)

    def scores(self, pairs: Pairs) -> Scores:
        ids, types = np.concatenate(pairs.ids), np.concatenate(pairs.types)
        offsets = np.concatenate([[0], np.cumsum(pairs.lengths)]).astype(np.int64)
        return self._model.engine.forward(ids, types, offsets)[:, 0]

    def rank(self, query: str, documents: list[str]) -> list[tuple[int, float]]:
        return [(row["corpus_id"], row["score"]) for row in self._model.rank(query, documents)]

    def stages(self) -> dict[str, float]:
        return dict(self._model.last_usage["seconds"])


class FastRerankBfloat16(FastRerank):
    name, precision = "fastrerank-bfloat16", "bfloat16"


class FastRerankInt8(FastRerank):
    name, precision = "fastrerank-int8", "int8"


class FastRerankTorch(FastRerank):
    """Our torch engine on the CPU: transformers' body on packed rows, `ops.attention` for its attention."""

    name, modules = "fastrerank-torch", ("fastrerank", "torch", "transformers")
    setup = 'CrossEncoder(engine="torch", dtype="float32", num_threads=...), packed'

    def load(self) -> None:
        import fastrerank

        self._model = fastrerank.CrossEncoder(
            str(self.checkpoint), engine="torch", device="cpu", dtype=self.precision, num_threads=self.threads
        )


class Reference(Torch):
    """The yardstick of the check: transformers eager, one pair at a time (no padding), in float32 or float64."""

    name, settings, batch = "reference-float32", (), 1
    setup = "transformers eager, one pair at a time"

    def load(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(self.threads)
        self._model = AutoModelForSequenceClassification.from_pretrained(
            self.checkpoint, dtype=getattr(torch, self.dtype), attn_implementation="eager"
        ).eval()


class Reference64(Reference):
    name, precision, dtype = "reference-float64", "float64", "float64"


def _convert_onnx(checkpoint: Path, folder: Path) -> None:
    """Writes plain.onnx (export), fused.onnx (ONNX Runtime's transformer fusions) and int8.onnx (dynamic int8)."""
    if (folder / "int8.onnx").exists():
        return
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import AutoModelForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ones = torch.ones((2, 16), dtype=torch.int64)
    example = {"input_ids": ones * 100, "attention_mask": ones, "token_type_ids": ones * 0}
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}
    with torch.inference_mode():
        torch.onnx.export(
            model,
            kwargs=example,
            f=str(folder / "plain.onnx"),
            input_names=names,
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=17,
        )
    fused = optimize_model(
        str(folder / "plain.onnx"),
        model_type="bert",
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        opt_level=1,
    )
    fused.save_model_to_file(str(folder / "fused.onnx"))
    draft = folder / "draft-int8.onnx"
    quantize_dynamic(
        folder / "fused.onnx",
        draft,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": 1},
    )
    draft.rename(folder / "int8.onnx")


OURS: tuple[type[Engine], ...] = (FastRerank, FastRerankBfloat16, FastRerankInt8)
# Ours too, but not what a user of these models gets without asking: it takes part where it is named.
NAMED: tuple[type[Engine], ...] = (FastRerankTorch,)
RIVALS: tuple[type[Engine], ...] = (
    SentenceTransformers,
    SentenceTransformersModel,
    Torch,
    TorchBfloat16,
    OnnxRuntime,
    OnnxRuntimeInt8,
    OpenVino,
    OpenVinoBfloat16,
    OpenVinoInt8,
    CTranslate2,
    CTranslate2Int8,
)
_YARDSTICKS: tuple[type[Engine], ...] = (Reference, Reference64)
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in OURS + NAMED + RIVALS + _YARDSTICKS}
