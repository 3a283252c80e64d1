"""Servers and tabs for tests of the playground, shared by all of them: a browser takes seconds to start. Not by tests elsewhere:
while playwright runs, no event loop can be run beside it."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from tests.e2e.playground.browser import CHROMIUM, Tab, serve, tab_on


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


@pytest.fixture(scope="package")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """For tests that act while an answer is under way: eight seconds of it."""
    with serve(tmp_path_factory.mktemp("slow") / "log.txt", step_ms=20) as url:
        yield url


@pytest.fixture(scope="package")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("locked") / "log.txt", "--api-key", "sesame") as url:
        yield url


@pytest.fixture(scope="package")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With the default model: slow to start, and for what only a model can show."""
    try:
        find_default_model()
    except CheckpointError as error:
        pytest.skip(str(error))
    with serve(tmp_path_factory.mktemp("real") / "log.txt", step_ms=None) as url:
        yield url


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Browser, server: str) -> Iterator[Tab]:
    with tab_on(chromium, server) as tab:
        yield tab


@pytest.fixture
def slow_tab(chromium: Browser, slow_server: str) -> Iterator[Tab]:
    with tab_on(chromium, slow_server) as tab:
        yield tab


@pytest.fixture
def real_tab(chromium: Browser, real_server: str) -> Iterator[Tab]:
    with tab_on(chromium, real_server) as tab:
        yield tab


@pytest.fixture
def locked_tab(chromium: Browser, locked_server: str) -> Iterator[Tab]:
    with tab_on(chromium, locked_server) as tab:
        yield tab
