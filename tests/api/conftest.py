"""One application on a scripted engine, and an HTTP client that calls it in this process."""

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import ASGIApp

from streamserve.api.app import Api, create_app
from streamserve.config import ServerConfig
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def app(engine: ScriptedEngine) -> Api:
    return create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", aliases=("small",))


@pytest.fixture
async def http(app: Api) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


def client_of(app: ASGIApp, **options: object) -> httpx.AsyncClient:
    """A client of an application in this process."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30000", **options)  # type: ignore[arg-type]
