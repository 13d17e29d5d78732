"""The measures of the field: rerank a judged data set and score the ranking, or compare several systems on it.

`evaluate` measures one reranker in this process. `compare` runs several systems, each in a process of its own, and
tests their differences. Data sets come from `fastrerank.data.datasets`; the measures come from the `ir_measures`
package (`pip install 'fastrerank[eval]'`), so they are trec_eval's.
"""

from __future__ import annotations

from fastrerank.data.datasets import Candidate, JudgedQuery, judged_query, load_dataset, read_trec_run, write_trec_run
from fastrerank.evaluation.comparison import Comparison, compare
from fastrerank.evaluation.measures import measure
from fastrerank.evaluation.reranking import Evaluation, evaluate
from fastrerank.evaluation.statistics import PairedTest, holm, paired_tests
from fastrerank.evaluation.systems import System

__all__ = [
    "Candidate",
    "Comparison",
    "Evaluation",
    "JudgedQuery",
    "PairedTest",
    "System",
    "compare",
    "evaluate",
    "holm",
    "judged_query",
    "load_dataset",
    "measure",
    "paired_tests",
    "read_trec_run",
    "write_trec_run",
]
