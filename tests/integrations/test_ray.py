"""Ray: files scored by two workers of a local Ray, one of them killed; the server on replicas."""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_tiny import WORDS, save_tiny_cross_encoder

import fastrerank

pytest.importorskip("ray.data")
pytest.importorskip("psutil")

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from fastrerank.cli import main
from fastrerank.integrations.ray import PairScorer, score_files

Job = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray with room for two workers and the replicas; its server's interface may take a minute to open.

    Ray Serve kills a proxy that is not ready in 5 s, which a process on a busy machine needs for its imports alone.
    """
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()
    del os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_cross_encoder(tmp_path_factory.mktemp("ray")))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    return [
        {"id": i, "query": f"how {WORDS[i // 40 % 15]}", "document": " ".join(random.choice(WORDS, i % 40))}
        for i in range(3000)
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: str, rows: list[dict[str, Any]]) -> np.ndarray:
    model = fastrerank.CrossEncoder(checkpoint, device="cpu")
    return model.predict([(row["query"], row["document"]) for row in rows], activation_fn="identity")


def written(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*"))
    return [json.loads(line) for path in parts for line in path.read_text().splitlines()]


def workers() -> list[Any]:
    return [p for p in psutil.Process().children(recursive=True) if "PartScorer" in " ".join(p.cmdline()[:1])]


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_and_a_killed_job_lose_nothing(
    checkpoint: str,
    rows: list[dict[str, Any]],
    expected: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "in" / "a.jsonl").write_text("".join(lines[:1100]))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[1100:]).encode()))
    out = tmp_path / "out"
    job: Job = {
        "inputs": str(tmp_path / "in"),
        "output": str(out),
        "model": checkpoint,
        "workers": 2,
        "rows_per_part": 50,
        "device": "cpu",
    }
    killed: list[int] = []
    seen: list[int] = []

    class Ended(Exception):
        pass

    def kill_one_then_end(done: int, of: int) -> None:
        seen.append(done)
        assert of == len(rows)
        if done >= 500 and not killed:
            victim = workers()[0]
            victim.kill()
            killed.append(victim.pid)
        if done >= 1800:
            raise Ended

    with pytest.raises(Ended):
        score_files(**job, progress=kill_one_then_end)
    assert killed
    assert seen == sorted(seen)
    _, alive = psutil.wait_procs(workers(), timeout=60)  # one may be writing a part when the job ends
    assert not alive
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 1800 // 50 <= len(before) < 60
    torn = out / min(before)
    torn.write_bytes(torn.read_bytes()[:-1])
    (out / ".part-000001-left-over.tmp").write_text("half")

    found = score_files(**job)
    assert found == {"rows": 3000, "parts": 60, "resumed": 50 * (len(before) - 1)}
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert {name for name, moment in before.items() if after[name] != moment} == {torn.name}
    result = written(out)
    assert [{name: row[name] for name in ("id", "query", "document")} for row in result] == rows
    assert np.array_equal(np.array([row["score"] for row in result], np.float32), expected)
    assert sorted({path.name[:5] for path in out.iterdir()}) == ["_job.", "part-"]

    command = ["score", str(tmp_path / "in"), str(out), "--model", checkpoint, "--device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--rows-per-part", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 3000, "parts": 60, "resumed": 3000}
    assert main([*command, "--dtype", "int8"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="another job's scores, with rows_per_part 50, not 60"):
        score_files(**{**job, "rows_per_part": 60})
    with pytest.raises(ValueError, match=r"holds no _job\.json"):
        score_files(**{**job, "output": job["inputs"]})


@pytest.mark.usefixtures("cluster")
def test_parquet_stays_parquet(
    checkpoint: str, rows: list[dict[str, Any]], expected: np.ndarray, tmp_path: Path
) -> None:
    table = pa.Table.from_pylist(rows).rename_columns(["id", "question", "passage"])
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=700)
    found = score_files(
        str(tmp_path / "pairs.parquet"),
        str(tmp_path / "out"),
        checkpoint,
        workers=2,
        rows_per_part=999,
        query="question",
        document="passage",
        score="logit",
        keep=["id"],
        device="cpu",
    )
    assert found == {"rows": 3000, "parts": 4, "resumed": 0}
    result = pq.read_table(tmp_path / "out")
    assert result.schema.equals(pa.schema([("id", pa.int64()), ("logit", pa.float32())]))
    assert result["id"].to_pylist() == list(range(3000))
    assert np.array_equal(result["logit"].to_numpy(), expected)

    scored = ray.data.from_arrow(table).map_batches(
        PairScorer,
        fn_constructor_kwargs={"model": checkpoint, "query": "question", "document": "passage", "device": "cpu"},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=500,
    )
    columns = scored.to_pandas().sort_values("id")
    assert np.array_equal(columns["score"].to_numpy(np.float32), expected)


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_cannot_do_is_one_message(checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "document": "d"}\n{"query": "q", "document": null}\n')
    with pytest.raises(RuntimeError, match=r"TypeError: .*pairs\.jsonl: row 1 has nothing where 'document'"):
        score_files(str(path), str(tmp_path / "a"), checkpoint, rows_per_part=1, device="cpu")
    with pytest.raises(RuntimeError, match=r"FileNotFoundError: .*is not a Hugging Face checkpoint"):
        score_files(str(path), str(tmp_path / "b"), str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="workers must be an int of at least 1, got 0"):
        score_files(str(path), str(tmp_path / "c"), checkpoint, workers=0)
    with pytest.raises(ValueError, match=r"inputs name .* twice"):
        score_files([str(path), str(path)], str(tmp_path / "c"), checkpoint)


def test_wrong_names_are_told_before_replicas_start() -> None:
    from fastrerank.integrations.ray_serve import Arguments, app

    for wrong, message in (
        ({"model": ["a=x", "a=y"]}, "two models are named 'a'"),
        ({"model": "a=x", "alias": "b=c"}, "no model is named 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            app(Arguments(**wrong))


@pytest.mark.usefixtures("cluster")
def test_serve(checkpoint: str) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    httpx = pytest.importorskip("httpx")
    from ray import serve

    from fastrerank.integrations.ray_serve import Arguments, app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port}, logging_config={"enable_access_log": False})
    arguments = Arguments(
        model=f"small={checkpoint}",
        options={"device": "cpu"},
        max_replicas=2,
        target_ongoing_requests=1,
        autoscaling={"upscale_delay_s": 0.2, "look_back_period_s": 0.5},
    )
    handle = serve.run(app(arguments))
    model = fastrerank.CrossEncoder(checkpoint, device="cpu")
    documents = ["cats sleep all day", "a flea lives up to a year", "", "fleas"]
    raw = model.score("how long", documents).tolist()
    body = {"query": "how long", "texts": documents, "raw_scores": True}
    failed: list[Any] = []
    stop = threading.Event()

    def client() -> None:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                while not stop.is_set():
                    found = http.post("/rerank", json=body).raise_for_status().json()
                    assert {row["index"]: row["score"] for row in found} == dict(enumerate(raw))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=client) for _ in range(8)]
    try:
        assert handle.score.remote("how long", documents).result() == raw
        assert [row["corpus_id"] for row in handle.rank.remote("how long", documents, top_k=2).result()] == [
            row["corpus_id"] for row in model.rank("how long", documents, top_k=2)
        ]
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v2/rerank", json={"query": "how long", "documents": documents, "model": "small"}
        )
        assert [row["index"] for row in answer.json()["results"]] == np.argsort(-np.array(raw)).tolist()
        for thread in threads:
            thread.start()
        for _ in range(200):
            states = serve.status().applications["default"].deployments["fastrerank"].replica_states
            if states.get("RUNNING", 0) == 2 or failed:
                break
            time.sleep(0.2)
        assert states.get("RUNNING", 0) == 2
    finally:
        stop.set()
        for thread in threads:
            if thread.ident:
                thread.join()
        serve.shutdown()
    assert failed == []
