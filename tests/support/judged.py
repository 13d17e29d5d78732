"""Judged queries for tests of the evaluation, made of words that the tiny models know."""

from __future__ import annotations

import json

import numpy as np
from helpers_tiny import WORDS

from fastrerank.evaluation import Candidate, JudgedQuery

QUERIES, DOCUMENTS = 9, 12


def pool(queries=QUERIES, seed=0):
    """Queries of words that the tiny models know; the last one has no judgements, and one has none that is positive."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(queries):
        texts = [" ".join(random.choice(WORDS, random.integers(2, 9))) for _ in range(DOCUMENTS)]
        candidates = tuple(Candidate(f"d{number}-{i}", text) for i, text in enumerate(texts))
        grades = {f"d{number}-{i}": int(random.integers(0, 4)) for i in range(0, DOCUMENTS, 2)}
        grades[f"elsewhere{number}"] = 2  # judged, not a candidate
        if number == 2:
            grades = dict.fromkeys(grades, 0)
        query = " ".join(random.choice(WORDS, 4)) + " <b>&"
        made.append(JudgedQuery(f"q{number}", query, candidates, {} if number == queries - 1 else grades))
    return made


def rows_file(path, queries):
    rows = [
        {
            "qid": query.qid,
            "query": query.query,
            "candidates": [
                {"docid": c.docid, "text": c.text, "rel": query.judgements.get(c.docid)} for c in query.candidates
            ],
        }
        for query in queries
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
