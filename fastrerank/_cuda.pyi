from typing import Any

architectures: str
runtime: int

def status() -> str: ...
def devices() -> list[dict[str, Any]]: ...
def bandwidth(device: int, bytes: int, rounds: int) -> float: ...
def cur_scratch(int8: bool, count: int, stored_width: int, rows: int, k: int, wanted: int, processors: int) -> int: ...
def cur_topk(
    int8: bool,
    tiles: int,
    tile_bytes: int,
    count: int,
    scale: int,
    anchor: int,
    width: int,
    stored_width: int,
    reach: float,
    queries: int,
    rows: int,
    k: int,
    wanted: int,
    processors: int,
    scratch: int,
    ids: int,
    scores: int,
    device: int,
    stream: int,
) -> None: ...
def cur_status(scratch: int, rows: int, device: int, stream: int) -> list[int]: ...
