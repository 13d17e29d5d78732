from typing import Any

architectures: str
runtime: int

def status() -> str: ...
def devices() -> list[dict[str, Any]]: ...
def bandwidth(device: int, bytes: int, rounds: int) -> float: ...

cur_most_k: int

def cur_scan(
    int8: bool,
    tiles: int,
    tile_bytes: int,
    count: int,
    scale: int,
    first: int,
    stored_width: int,
    query: int,
    k: int,
    best: int,
    blocks: int,
    ids: int,
    scores: int,
    stream: int,
) -> None: ...
