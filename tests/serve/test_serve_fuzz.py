"""Whatever the OpenAPI document allows, and what it does not: no request makes the server fail."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("schemathesis")
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from serve_fakes import Lengths

from fastrerank.serve.app import create_app
from fastrerank.serve.batching.batcher import AsyncReranker


class Kept(AsyncReranker):
    """Outlives the application, which schemathesis starts and stops around every request."""

    async def aclose(self, grace: float | None = None) -> None:
        pass


schema = schemathesis.openapi.from_asgi(
    "/openapi.json", create_app({"fake": Kept(Lengths(), max_wait_ms=0, workers=1)})
)


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
def test_no_request_is_the_servers_fault(case: schemathesis.Case) -> None:
    assert case.call().status_code < 500
