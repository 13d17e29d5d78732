"""Ray Serve: the server of `fastrerank serve` on replicas that come and go with the load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from fastrerank.integrations.loading import call_options, load_reranker
from fastrerank.rerankers.base import Reranker
from fastrerank.runtime.types import Hit
from fastrerank.serve.api.errors import Flavor
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker
from fastrerank.serve.health import WorkerDied, dead
from fastrerank.serve.names import hub_names, parse_aliases, parse_labels
from fastrerank.serve.run import parse_models, read_keys

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.call import Options

__all__ = ["Arguments", "Replica", "app"]


class Arguments(BaseModel):
    """What `app` takes, from Python, from a configuration file's `args:`, or as NAME=VALUE of `serve run`.

    Attributes:
        model: checkpoint, or NAME=CHECKPOINT; or several. The first is the one that requests need not name.
        alias: ALIAS=NAME, or several: further names of models.
        method, options: as in `fastrerank.load`, for all models.
        label: the label that ranks where a head has several: a name or number for all models, NAME=LABEL for one, or
            a list of these. A replica does not start without it, unless the names of the labels tell.
        num_threads, num_gpus: what a replica computes with, and reserves.
        max_batch_tokens, max_wait_ms, max_queue_tokens: as in `fastrerank.AsyncReranker`, in each replica.
        api_flavor, max_documents, timeout: as `fastrerank serve` has them.
        min_replicas, max_replicas: bounds of autoscaling; `min_replicas` 0 lets an idle application end its replicas.
        target_ongoing_requests: of a replica: above it replicas are added, below it taken away.
        max_ongoing_requests: that a replica is given; it makes batches of them.
        autoscaling: further fields of `ray.serve.config.AutoscalingConfig`, such as `upscale_delay_s`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | list[str]
    alias: str | list[str] = Field(default_factory=list)
    method: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    label: str | int | list[str | int] | None = None
    num_threads: int = Field(1, ge=1)
    num_gpus: float = Field(0.0, ge=0)
    max_batch_tokens: int = Field(16384, ge=1)
    max_wait_ms: float = Field(2.0, ge=0)
    max_queue_tokens: int = Field(2_000_000, ge=1)
    api_flavor: Flavor = Flavor.auto
    max_documents: int = Field(10_000, ge=1)
    timeout: float | None = Field(None, gt=0)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(8.0, gt=0)
    max_ongoing_requests: int = Field(256, ge=1)
    autoscaling: dict[str, Any] = Field(default_factory=dict)


class Replica:
    """One replica: its models, their batches across requests, and the routes; made by `app`.

    Keys are those of FASTRERANK_API_KEY in the replica's environment. Handles of the deployment may call `rank` and
    `score` without HTTP; their requests share the batches.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        given = Arguments(**arguments)
        named = parse_models(_list(given.model))
        aliases = hub_names(named) | parse_aliases(_list(given.alias), named)
        labels = parse_labels(_labels(given), named)
        self.aliases = aliases
        self.models = {
            name: AsyncReranker(
                _loaded(checkpoint, labels.get(name), given),
                max_batch_tokens=given.max_batch_tokens,
                max_wait_ms=given.max_wait_ms,
                max_queue_tokens=given.max_queue_tokens,
            )
            for name, checkpoint in named.items()
        }
        settings = Settings(
            keys=read_keys(None),
            flavor=given.api_flavor,
            max_documents=given.max_documents,
            timeout=given.timeout,
            aliases=aliases,
        )
        self.routes = create_app(self.models, settings)

    def check_health(self) -> None:
        """Raise where a worker thread has died: Ray Serve then starts the replica anew."""
        problem = dead(self.models)
        if problem is not None:
            raise WorkerDied(problem)

    def __serve_build_asgi_app__(self) -> Any:
        return self.routes

    async def score(
        self, query: str, documents: list[str], model: str | None = None, **options: Unpack[Options]
    ) -> list[float]:
        """Return each document's raw score, in their order; `options` are those of `Reranker.score`.

        `model`: a name or an alias; None for the first.
        """
        scores: list[float] = (await self._named(model).score(query, documents, **options)).tolist()
        return scores

    async def rank(
        self,
        query: str,
        documents: list[str],
        top_k: int | None = None,
        model: str | None = None,
        *,
        raw: bool = False,
        **options: Unpack[Options],
    ) -> list[Hit]:
        """Return [{"corpus_id", "score"}], best first, as `Reranker.rank` does: activated scores unless `raw`."""
        return await self._named(model).rank(query, documents, top_k=top_k, raw=raw, **options)

    def _named(self, model: str | None) -> AsyncReranker:
        if model is None:
            return next(iter(self.models.values()))
        name = self.aliases.get(model, model)
        if name not in self.models:
            raise ValueError(f"model must be one of {', '.join([*self.models, *self.aliases])}, got {model!r}")
        return self.models[name]


def app(arguments: Arguments) -> serve.Application:
    """Return the Ray Serve application: all routes of `fastrerank serve`, on replicas that scale with the load.

    Args:
        arguments: see `Arguments`. It must be served at the root: `route_prefix="/"`, which is Serve's default.

    Example:
        >>> serve.run(app(Arguments(model="BAAI/bge-reranker-base", max_replicas=8)))         # doctest: +SKIP
    """
    # Raise for a wrong name here, as replicas would only fail to start.
    named = parse_models(_list(arguments.model))
    parse_aliases(_list(arguments.alias), named)
    parse_labels(_labels(arguments), named)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="fastrerank",
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing_requests,
            **arguments.autoscaling,
        },
        max_ongoing_requests=arguments.max_ongoing_requests,
        ray_actor_options={"num_cpus": arguments.num_threads, "num_gpus": arguments.num_gpus},
    )
    return deployment.bind(arguments.model_dump(mode="json"))


def _loaded(checkpoint: str, label: str | int | None, given: Arguments) -> Reranker:
    """A model that can serve; ValueError for a head of several labels where nothing tells which one ranks."""
    options = given.options | call_options(label)
    return load_reranker(checkpoint, given.method, {"num_threads": given.num_threads, **options})


def _list(model: str | list[str]) -> list[str]:
    return [model] if isinstance(model, str) else model


def _labels(given: Arguments) -> list[str]:
    """The values of `label` as the command line has them."""
    labels = given.label if isinstance(given.label, list) else [] if given.label is None else [given.label]
    return list(map(str, labels))
