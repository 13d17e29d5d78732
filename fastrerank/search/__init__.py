"""The best k of N items under an expensive scorer: one index, one loop (ANNCUR, ADACUR, AXN)."""

from fastrerank.search.contents import Settings
from fastrerank.search.index import CURIndex

__all__ = ["CURIndex", "Settings"]
