"""Systems side by side: the same figures as alone, failures that stay their own, files that can be read back."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from helpers_tiny import save_tiny_cross_encoder
from judged import DOCUMENTS, QUERIES, pool, rows_file
from rich.console import Console

import fastrerank
from fastrerank.evaluation import Comparison, System, compare, evaluate, measure, paired_tests
from fastrerank.evaluation import worker as worker_module
from fastrerank.evaluation.plots import differences
from fastrerank.evaluation.report import to_html
from fastrerank.evaluation.table import mark, print_comparison, tab_separated


class Reversed:
    def rank(self, _query, documents):
        return [{"corpus_id": i, "score": float(i)} for i in reversed(range(len(documents)))]


class Raises(Reversed):
    def rank(self, _query, _documents):
        raise RuntimeError("the reactor\nis cold")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return [save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run of the first half of the queries, with ties and with documents that are no candidates."""
    path = tmp_path_factory.mktemp("run") / "old.trec"
    lines = [f"q{n} Q0 d{n}-{i} {i + 1} {5.0 - i // 2} old\n" for n in range(QUERIES // 2) for i in range(4)]
    lines += [f"q{n} Q0 elsewhere{n} 5 1.0 old\n" for n in range(QUERIES // 2)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def found(tiny, run_file):
    systems = {
        "one": {"model": tiny[0], "dtype": "float32", "num_threads": 1},
        "two <i>": {"model": str(tiny[1]), "dtype": "int8"},
        "absent": str(tiny[0] / "nowhere"),
        "object": Reversed(),
        "broken": Raises(),
        "old": {"run": run_file},
    }
    return compare(systems, {"set": pool()}, baseline="one", measures=["nDCG@10", "MRR@10", "P@5", "AP(rel=2)"])


def test_each_system_has_the_figures_it_has_alone(found, tiny):
    alone = evaluate(fastrerank.load(str(tiny[0]), dtype="float32"), pool())
    apart = found.results["set"]["one"]
    assert apart.run == alone.run
    assert apart.metrics["nDCG@10"] == alone.metrics["nDCG@10"]
    assert {qid: row["MRR@10"] for qid, row in apart.per_query.items()} == {
        qid: row["MRR@10"] for qid, row in alone.per_query.items()
    }
    assert found.results["set"]["first-stage"].metrics["nDCG@10"] == alone.first_stage["nDCG@10"]
    assert apart.curves["nDCG"][10] == alone.metrics["nDCG@10"]
    assert list(apart.curves["Recall"]) == [1, 2, 3, 5, 10, DOCUMENTS]


def test_a_comparison_shows_its_tables(found):
    shown = repr(found)
    assert "nDCG@10" in shown
    assert all(name in shown for name in found.systems)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 110


def test_latency_and_memory_are_of_the_process(found):
    for name in ("one", "two <i>"):
        result, system = found.results["set"][name], found.systems[name]
        assert result.latencies.shape == (QUERIES,)
        assert 0 < result.latency(50) <= result.latency(95)
        assert 10 * 2**20 < system["peak_bytes"] < 4 * 2**30
        assert system["load_seconds"] > 0
    assert found.systems["object"]["peak_bytes"] is None
    assert found.results["set"]["object"].latency(50) > 0
    assert found.results["set"]["old"].latency(50) is None


def test_failures_are_named_and_the_others_go_on(found):
    assert [(failure.system, failure.dataset) for failure in found.failures] == [("absent", None), ("broken", "set")]
    absent, broken = found.failures
    assert "nowhere" in absent.error
    assert absent.detail.startswith("Traceback")
    assert broken.error == "RuntimeError: the reactor is cold"
    assert list(found.results["set"]) == ["first-stage", "one", "two <i>", "object", "old"]


def test_a_run_is_measured_as_it_is_and_its_oddities_are_noted(found):
    judgements = {query.qid: query.judgements for query in pool() if query.judgements}
    old = found.results["set"]["old"]
    assert len(old.per_query) == QUERIES - 1
    assert old.per_query["q7"]["nDCG@10"] == 0.0
    absent, foreign, tied = old.notes
    assert absent.startswith("ranks nothing for 4 of 8 judged queries")
    assert foreign.startswith("ranks 4 documents that are not")
    assert tied.startswith("8 scores tie")
    ranked = {f"q{n}": {f"d{n}-{i}": -i for i in range(4)} | {f"elsewhere{n}": -4} for n in range(QUERIES // 2)}
    theirs = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], judgements, ranked)
    assert old.metrics["nDCG@10"] == pytest.approx(theirs[ir_measures.nDCG @ 10])


def test_measures_equal_trec_evals_on_random_runs(random):
    names = {"nDCG@10": "ndcg_cut_10", "MRR": "recip_rank", "Recall@100": "recall_100", "P@5": "P_5", "AP": "map"}
    for relevance in (1, 2):
        judgements, run = {}, {}
        for number in range(20):
            documents = [f"d{i}" for i in random.permutation(150)]
            judgements[f"q{number}"] = {d: int(g) for d, g in zip(documents, random.integers(0, 4, 60), strict=False)}
            some = random.permutation(documents)[:120].tolist()
            run[f"q{number}"] = [(d, float(s)) for d, s in zip(some, -np.sort(-random.normal(size=120)), strict=True)]
        del run["q3"]
        ours = measure(run, judgements, measures=list(names), min_relevance=relevance)
        evaluator = pytrec_eval.RelevanceEvaluator(judgements, set(names.values()), relevance_level=relevance)
        theirs = evaluator.evaluate({qid: dict(hits) for qid, hits in run.items()})
        for qid, row in theirs.items():
            assert ours[qid] == pytest.approx({name: row[column] for name, column in names.items()})
        assert set(ours["q3"].values()) == {0.0}


def test_tests_are_those_of_the_per_query_values(found):
    results = found.results["set"]
    others = [name for name in results if name != "one"]
    rows = {name: [row["AP(rel=2)"] for row in result.per_query.values()] for name, result in results.items()}
    assert found.tests("set", "AP(rel=2)") == dict(
        zip(others, paired_tests([rows[name] for name in others], rows["one"]), strict=True)
    )
    there, back = found.tests("set", "nDCG@10")["object"], found.tests("set", "nDCG@10", baseline="object")["one"]
    assert (there.difference, there.p_t, there.better) == pytest.approx((-back.difference, back.p_t, back.worse))
    assert found.tests("set", "nDCG@10", baseline="broken") == {}
    with pytest.raises(ValueError, match="no system is named 'three'"):
        found.tests("set", "nDCG@10", baseline="three")


@pytest.fixture(scope="module")
def saved(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return folder, found.save(folder)


def test_written_runs_give_the_same_figures(found, saved):
    folder, written = saved
    judgements = {query.qid: dict(query.judgements) for query in pool() if query.judgements}
    wanted = {"nDCG@10": ir_measures.nDCG @ 10, "MRR@10": ir_measures.RR @ 10, "P@5": ir_measures.P @ 5}
    for name, result in found.results["set"].items():
        path = folder / "runs" / "set" / f"{re.sub('[^a-z-]+', '_', name)}.trec"
        assert path in written
        theirs = ir_measures.calc_aggregate(list(wanted.values()), judgements, ir_measures.read_trec_run(str(path)))
        for measured, parsed in wanted.items():
            assert result.metrics[measured] == pytest.approx(theirs[parsed]), (name, measured)


def test_results_are_read_back(found, saved):
    folder, _ = saved
    back = Comparison.load(folder)
    assert back.to_json() == found.to_json()
    assert back.tests("set", "P@5") == found.tests("set", "P@5")
    data = json.loads((folder / "results.json").read_text())
    assert (
        data["results"]["set"]["one"]["per_query"]["q0"]["nDCG@10"]
        == found.results["set"]["one"].per_query["q0"]["nDCG@10"]
    )
    assert data["tests"]["set"]["nDCG@10"]["object"]["p_holm"] == found.tests("set", "nDCG@10")["object"].p_holm
    with pytest.raises(ValueError, match="format"):
        Comparison.from_json({"format": 99})


class Page(HTMLParser):
    """Raises where tags do not nest; gathers texts, tags and attributes."""

    EMPTY = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_stands_alone_and_names_everything(found, saved):
    text = (saved[0] / "report.html").read_text()
    page = Page(text)
    shown = " ".join(page.texts)
    for name in found.systems:
        assert name in shown
    assert "the reactor is cold" in shown
    assert page.tags.count("svg") == 4 + 4  # scatter, intervals, two curves; bars of each system but the baseline
    assert pool()[0].query in shown  # with its <b>, as text
    assert not {"script", "link", "img", "iframe", "b>"} & set(page.tags)
    assert not [entry for entry in page.attributes if entry[1] in ("src", "href", "srcset", "onload")]
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL))


def test_numbers_of_the_plots_are_inside_them(saved):
    for width, height, body in re.findall(
        r'<svg viewBox="0 0 (\d+) (\d+)".*?>(.*?)</svg>', (saved[0] / "report.html").read_text()
    ):
        for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', body):
            assert 0 < float(x) < int(width)
            assert 0 < float(y) < int(height)
        for x, y, w, h in re.findall(
            r'<rect class="(?:up|down)" x="(.+?)" y="(.+?)" width="(.+?)" height="(.+?)"', body
        ):
            assert float(x) + float(w) < int(width)
            assert 0 < float(y) <= float(y) + float(h) < int(height)


@pytest.mark.parametrize("queries", [2, 3])
def test_reports_of_few_queries_and_equal_values(queries):
    class Keeps:
        def rank(self, _query, documents):
            return [{"corpus_id": i, "score": float(-i)} for i in range(len(documents))]

    few = compare({"same": Keeps(), "other": Reversed(), "none": {"q0": []}}, pool(queries))
    assert bool(few.tests("dataset", "nDCG@10")) == (queries > 2)  # one of the queries is not judged
    Page(to_html(few))
    json.dumps(few.to_json(), allow_nan=False)


def test_many_queries_are_one_area():
    values = {f"q{i}": (math.sin(i), "tip") for i in range(500)}
    text = differences(values, "label")
    Page(text)
    assert (text.count('class="area"'), text.count('class="hit"')) == (1, 0)
    assert differences(dict(list(values.items())[:400]), "label").count('class="hit"') == 400


def test_several_data_sets_and_their_means(tmp_path):
    sets = {"a": pool(), "b": rows_file(tmp_path / "b.jsonl", pool(6, seed=1))}
    calls = []
    both = compare({"object": Reversed(), "broken": Raises()}, sets, progress=lambda *call: calls.append(call))
    assert ("object", "b", 6, 6) in calls
    values = [both.results[name]["object"].metrics["nDCG@10"] for name in sets]
    assert both.means()["object"]["nDCG@10"] == pytest.approx(sum(values) / 2)
    assert list(both.means()) == ["first-stage", "object"]
    assert both.datasets["b"].source == str(tmp_path / "b.jsonl")
    assert "Mean of the data sets" in to_html(both)
    assert [row[:2] for row in tab_separated(both)[1:]] == [
        [name, system] for name in sets for system in ("first-stage", "object", "broken")
    ]
    with pytest.raises(ValueError, match="a run belongs to one data set"):
        compare({"old": {"q0": [("d0-0", 1.0)]}}, sets)


def test_top_k_and_warmup():
    class Counts(Reversed):
        calls = 0

        def rank(self, query, documents):
            self.calls += 1
            return super().rank(query, documents[:3])

    counted = Counts()
    result = compare({"c": counted}, pool(), top_k=3, warmup=2).results["dataset"]["c"]
    assert counted.calls == QUERIES + 2
    assert [docid for docid, _ in result.run["q0"]] == [
        "d0-2",
        "d0-1",
        "d0-0",
        *(f"d0-{i}" for i in range(3, DOCUMENTS)),
    ]


@pytest.mark.parametrize(
    ("start", "error"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL (out of memory?); its last line: it printed nothing"),
        ("print('all is lost'); raise SystemExit(3)", "ended with exit code 3; its last line: all is lost"),
        ("pass", "ended with exit code 0"),
    ],
)
def test_a_process_that_dies_is_a_failure_of_its_system_only(monkeypatch, start, error):
    monkeypatch.setattr(worker_module, "_START", start)
    result = compare({"dies": "model", "object": Reversed()}, pool())
    (failure,) = result.failures
    assert error in failure.error
    assert "object" in result.results["dataset"]


@pytest.mark.parametrize(
    ("systems", "options", "error", "message"),
    [
        ({"a": Reversed()}, {"baseline": "b"}, ValueError, "baseline 'b' is none of the systems: first-stage, a"),
        ({"first-stage": Reversed()}, {}, ValueError, "have one name"),
        ({"a b": Reversed(), "a_b": Reversed()}, {}, ValueError, "'a b' and 'a_b' have one name"),
        ({"a/b": Reversed()}, {}, ValueError, "without slashes"),
        ({"a": 3}, {}, TypeError, "system 'a' must be a checkpoint"),
        ({"a": {"model": "m", "method": "magic"}}, {}, ValueError, "method must be one of cross-encoder"),
        ({"a": {"model": "m", "token": "secret"}}, {}, ValueError, "HF_TOKEN"),
        ({"a": {"run": "file", "dtype": "int8"}}, {}, ValueError, "a run has no options, got dtype"),
        ({"a": Reversed()}, {"measures": ["nDCG@10", "magic@3"]}, ValueError, "'magic@3' is not known"),
        ({"a": Reversed()}, {"measures": ["P@5", "P@5"]}, ValueError, "twice"),
        ({"a": Reversed()}, {"measures": ["P@0"]}, ValueError, "cut-off"),
        ({"a": Reversed()}, {"measures": []}, ValueError, "at least one measure"),
        ({"a": Reversed()}, {"top_k": 0}, ValueError, "top_k"),
        ({"a": Reversed()}, {"warmup": -1}, ValueError, "warmup"),
    ],
)
def test_refusals(systems, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        compare(systems, pool(3), **options)


def test_a_system_is_one_of_three():
    with pytest.raises(ValueError, match="must be one of model=, ranker= and run="):
        System("a", model="m", run="r")


def printed(comparison, width):
    console = Console(
        force_terminal=True, width=width, file=io.StringIO(), color_system="standard", legacy_windows=False
    )
    print_comparison(comparison, console)
    return console.file.getvalue()


def test_the_table_on_a_terminal(found):
    wide, narrow = printed(found, 140), printed(found, 90)
    assert "old ranks nothing for 4 of 8 judged queries" in wide
    assert re.search(r"broken +│ .*failed", wide)
    assert ("Δ" in wide, "Δ" in narrow, "p95" in narrow) == (True, False, True)
    best = max(result.metrics["P@5"] for result in found.results["set"].values())
    assert re.search(rf"\x1b\[1m *{best:.4f}", wide)


def test_marks_say_better_and_worse():
    up, down, small = paired_tests([[0.9] * 8, [0.1] * 8, [0.5] * 7 + [0.6]], [0.5] * 8)
    assert [mark(test) for test in (up, down, small, None)] == ["▲", "▼", "", ""]


def test_peak_memory_is_that_of_the_process_itself():
    code = """
import numpy as np
from fastrerank.evaluation.worker import peak_bytes
before = peak_bytes()
held = np.ones(8 << 20)
del held
print(before, peak_bytes())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, printed.split())
    assert before + (60 << 20) < after < before + (128 << 20)
    assert before < worker_module.peak_bytes()  # of this process, which started that one
