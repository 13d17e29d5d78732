from typing import Any

architectures: str
runtime: int

def status() -> str: ...
def devices() -> list[dict[str, Any]]: ...
def bandwidth(device: int, bytes: int, rounds: int) -> float: ...
def cur_topk_scratch(int8: bool, stored_width: int, rows: int, wanted: int, blocks: int) -> int: ...
def cur_topk(
    int8: bool,
    tiles: int,
    tile_bytes: int,
    count: int,
    scale: int,
    anchors: int,
    first: int,
    width: int,
    stored_width: int,
    reach: float,
    queries: int,
    rows: int,
    k: int,
    wanted: int,
    blocks: int,
    scratch: int,
    ids: int,
    scores: int,
    status: int,
    stream: int,
) -> None: ...
