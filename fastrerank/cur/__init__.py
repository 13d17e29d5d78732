"""The best k of N items under an expensive scorer: one index, one loop (ANNCUR, ADACUR, AXN)."""

from fastrerank.cur.contents import Settings
from fastrerank.cur.index import CURIndex

__all__ = ["CURIndex", "Settings"]
