"""The best k of N items under an expensive scorer: one index, one loop (ANNCUR, ADACUR, AXN)."""

from fastrerank.cur.index import CURIndex, Settings

__all__ = ["CURIndex", "Settings"]
