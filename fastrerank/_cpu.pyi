from typing import Any

import numpy as np
import numpy.typing as npt

class Encoder:
    def __init__(self, config: dict[str, Any], isa: str) -> None: ...
    def set_linear(
        self, layer: int, name: str, weight: npt.NDArray[Any], bias: npt.NDArray[np.float32] | None
    ) -> None: ...
    def set_norm(
        self, layer: int, name: str, gamma: npt.NDArray[np.float32], beta: npt.NDArray[np.float32] | None
    ) -> None: ...
    def set_factor(self, layer: int, name: str, factor: npt.NDArray[np.float32]) -> None: ...
    def set_strip(self, layer: int, columns: npt.NDArray[np.int32], weight: npt.NDArray[np.float32]) -> None: ...
    def set_word_rows(self, fd: int, path: str, offset: int, size: int, changed: int, dtype: str) -> None: ...
    def set_tables(
        self,
        word: npt.NDArray[Any] | None,
        position: npt.NDArray[np.float32] | None,
        type: npt.NDArray[np.float32] | None,
    ) -> None: ...
    def add_rope(self, theta: float, half: int) -> None: ...
    def add_dense(self, weight: npt.NDArray[Any], bias: npt.NDArray[np.float32] | None, activation: str) -> None: ...
    def add_norm(self, gamma: npt.NDArray[np.float32], beta: npt.NDArray[np.float32] | None, eps: float) -> None: ...
    def add_normalize(self) -> None: ...
    def forward(
        self,
        ids: npt.NDArray[np.int32],
        types: npt.NDArray[np.int32] | None,
        offsets: npt.NDArray[np.int64],
        readout: str,
        threads: int,
    ) -> npt.NDArray[np.float32]: ...
    @property
    def output_width(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def isa(self) -> str: ...

class Linear:
    def __init__(self, w: npt.NDArray[Any], bias: npt.NDArray[np.float32] | None, dtype: str, isa: str) -> None: ...
    def run(self, x: int, ldx: int, rows: int, y: int, ldy: int, threads: int) -> None: ...
    def run_feed_forward(
        self,
        down: Linear,
        up: Linear | None,
        activation: str,
        x: int,
        ldx: int,
        rows: int,
        y: int,
        ldy: int,
        threads: int,
    ) -> None: ...

def levels() -> list[str]: ...
def attention(
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    lo: int,
    hi: int,
    plo: int,
    phi: int,
    rows: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    strides: list[int],
    dtype: str,
    scale: float,
    softcap: float,
    threads: int,
    isa: str,
) -> None: ...
def attention_mass(
    q: int,
    k: int,
    lse: int,
    lo: int,
    hi: int,
    row_weight: int,
    head_weight: int,
    out: int,
    rows: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    strides: list[int],
    dtype: str,
    scale: float,
    softcap: float,
    per_head: bool,
    threads: int,
    isa: str,
) -> None: ...
def set_openmp(start: int) -> None: ...
def norm_rows(
    x: int,
    dtype: str,
    x_row: int,
    rows: int,
    width: int,
    norm: str,
    gamma: int,
    beta: int,
    eps: float,
    y: int,
    y_row: int,
    threads: int,
    isa: str,
) -> None: ...
def label_logits(
    hidden: int,
    hidden_dtype: str,
    hidden_row: int,
    rows: int,
    weight: int,
    weight_dtype: str,
    weight_row: int,
    labels: int,
    width: int,
    norm: str,
    gamma: int,
    beta: int,
    eps: float,
    bias: int,
    scale: float,
    softcap: float,
    logits: int,
    order: int,
    threads: int,
    isa: str,
) -> None: ...
def cur_topk(
    shards: list[tuple[int, int, int, int]],
    storage: str,
    exact_storage: str,
    rounded: bool,
    width: int,
    anchor_scale: int,
    queries: int,
    rows: int,
    k: int,
    left_out: int,
    left_out_begin: int,
    ids: int,
    scores: int,
    threads: int,
    isa: str,
) -> tuple[int, int, int]: ...
def max_sim(
    query: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    threads: int,
    isa: str,
) -> npt.NDArray[np.float32]: ...
def peak(dtype: str, threads: int, isa: str) -> float: ...
