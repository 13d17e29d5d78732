"""The container files and the Kubernetes example name options, routes, extras and variables that there are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("yaml")

import typer.main
import yaml
from helpers_tiny import save_tiny_cross_encoder

import fastrerank
from fastrerank import cli
from fastrerank.serve.app import create_app
from fastrerank.serve.batcher import AsyncReranker
from fastrerank.serve.run import read_keys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The values that `fastrerank serve ARGUMENTS` gets; a usage error ends the test."""
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    values: dict[str, Any] = command.make_context("serve", list(arguments)).params
    return values


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"))
    app = create_app({"tiny": AsyncReranker(fastrerank.load(str(folder)))})
    return {route.path for route in app.routes if hasattr(route, "path")}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_a_dockerfile_serves(path: Path, routes: set[str]) -> None:
    text = path.read_text("utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    last = {
        line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in lines if re.match(r"(ENTRYPOINT|CMD|EXPOSE)\b", line)
    }
    command = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]
    assert command[:2] == ["fastrerank", "serve"]
    values = parsed(command[2:])
    assert values["host"] == "0.0.0.0"
    assert values["port"] == int(last["EXPOSE"])

    (check,) = (line for line in lines if line.startswith("HEALTHCHECK"))
    port, route = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)[0]
    assert int(port) == values["port"]
    assert route in routes
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE), "the server must not run as root"

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for used in re.findall(r"fastrerank\[([\w,]+)\]", text):
        assert set(used.split(",")) <= set(extras)
    for example in re.findall(r"#   docker run .* fastrerank:\w+ (--.*)", text):
        parsed(example.split())


def test_the_kubernetes_example(routes: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {
        each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text("utf-8"))
    }
    deployment, service = documents["Deployment"], documents["Service"]
    template = deployment["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    values = parsed(
        ["--host", "0.0.0.0", "--port", "8080", *container["args"]]
    )  # the image's entry point is before them

    (port,) = container["ports"]
    assert port["containerPort"] == values["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in routes
        assert container[probe]["httpGet"]["port"] == port["name"]
    notes = template["metadata"]["annotations"]
    assert notes["prometheus.io/path"] in routes
    assert int(notes["prometheus.io/port"]) == values["port"]

    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + values["grace"]
    assert int(container["resources"]["requests"]["cpu"]) == values["threads"]
    assert pod["securityContext"]["runAsNonRoot"]

    (variable,) = container["env"]
    monkeypatch.setenv(variable["name"], "one,two")
    assert read_keys(None) == ("one", "two")

    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    scaled = documents["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["minReplicas"] <= deployment["spec"]["replicas"] <= scaled["maxReplicas"]
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_what_a_build_must_not_take_along() -> None:
    """The virtual environment and compiled files of the machine that builds would end up in the image."""
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert {".venv", "build", ".git", "**/*.so"} <= set(ignored)
