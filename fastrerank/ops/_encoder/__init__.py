"""The Python face of the encoder in C++, to which `engine.native` gives the weights of a checkpoint."""

from __future__ import annotations

from typing import Any

import fastrerank._cpu as _cpu
from fastrerank.runtime import cpu

__all__ = ["make_encoder"]


def make_encoder(config: dict[str, Any]) -> _cpu.Encoder:
    """Return an encoder without weights, for the level in force; csrc/encoder/encoder.h says what config holds.

    Raises ValueError for sizes that do not fit together, KeyError for one that is missing.
    """
    return _cpu.Encoder(config, cpu.isa())
