"""Files of deployment against the application and the command line that they name."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_tiny import save_tiny_cross_encoder

yaml = pytest.importorskip("yaml")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))
    return {one["kind"]: one for one in found}


@pytest.fixture(scope="module")
def container(objects: dict[str, Any]) -> dict[str, Any]:
    (one,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return one


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container["env"]}


def test_probes_metrics_and_ports_are_the_applications(objects: dict[str, Any], container: dict[str, Any]) -> None:
    from serve_fakes import Lengths

    import fastrerank
    from fastrerank.serve.app import create_app

    reranker = fastrerank.AsyncReranker(Lengths())
    routes = set(create_app({"one": reranker}).openapi()["paths"])
    reranker.close()
    template = objects["Deployment"]["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["path"] for probe in probes.values()} | {annotations["prometheus.io/path"]} <= routes
    assert probes["liveness"]["path"] == "/health"
    assert probes["readiness"]["path"] == "/ready"
    (port,) = container["ports"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert str(port["containerPort"]) == annotations["prometheus.io/port"] == environment(container)["PORT"]
    (exposed,) = objects["Service"]["spec"]["ports"]
    assert exposed["targetPort"] == port["name"]
    labels = template["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "fastrerank"


def test_the_pod_ends_after_the_server(objects: dict[str, Any], container: dict[str, Any]) -> None:
    arguments = container["args"]
    grace = float(arguments[arguments.index("--grace") + 1])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert objects["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > grace + pause


def test_the_key_comes_from_a_secret_by_the_name_that_is_read(
    container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrerank.serve.run import read_keys

    (name,) = [one["name"] for one in container["env"] if "secretKeyRef" in one.get("valueFrom", {})]
    monkeypatch.setenv(name, "a key")
    assert read_keys(None) == ("a key",)


def test_the_container_starts_is_healthy_and_ends(container: dict[str, Any], tmp_path: Path) -> None:
    """start.sh with the manifest's arguments, on a tiny model: options are known, the check works, SIGTERM ends it."""
    pytest.importorskip("httpx")
    if shutil.which("sh") is None:
        pytest.skip("no sh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {
        **os.environ,
        **environment(container),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT": port,
        "FASTRERANK_MODEL": str(save_tiny_cross_encoder(tmp_path)),
        "FASTRERANK_API_KEY": "key",
    }
    check = [sys.executable, str(DEPLOY / "healthcheck.py")]
    assert subprocess.run(check, env=variables, capture_output=True, check=False).returncode == 1
    server = subprocess.Popen(["sh", DEPLOY / "start.sh", *container["args"]], env=variables, stderr=subprocess.PIPE)
    try:
        for _ in range(300):
            if server.poll() is not None:
                raise AssertionError(server.stderr.read().decode())
            if subprocess.run(check, env=variables, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the container's check did not succeed")
        server.terminate()
        _, log = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode == 0
    assert json.loads(log.splitlines()[0])["port"] == int(port)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_copy_what_there_is_and_run_as_nobody_special(name: str, container: dict[str, Any]) -> None:
    text = (DEPLOY / name).read_text("utf-8")
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    stages = [line.split() for line in lines if line.startswith("FROM")]
    assert [stage[2:] for stage in stages] == [["AS", "build"], []]
    copied = [word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]]
    assert all((DEPLOY.parent / path).exists() for path in copied)
    for wanted in ("start.sh", "healthcheck.py"):
        assert f"deploy/{wanted}" in copied
        assert any(f"/opt/fastrerank/{wanted}" in line for line in lines[-2:])
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["10001"]
    assert any("useradd --uid 10001" in line for line in lines)
    (port,) = [line.split()[1] for line in lines if line.startswith("EXPOSE")]
    assert int(port) == container["ports"][0]["containerPort"]
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2].split(",")
    declared = (DEPLOY.parent / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)


def test_ray_serve_configuration_is_what_the_application_takes() -> None:
    pytest.importorskip("ray.serve")
    from ray.serve.schema import ServeDeploySchema

    from fastrerank.integrations import ray_serve

    config = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text("utf-8")))
    (application,) = config.applications
    assert application.import_path == f"{ray_serve.__name__}:{ray_serve.app.__name__}"
    assert application.route_prefix == "/"
    assert ray_serve.app(ray_serve.Arguments(**application.args)) is not None
