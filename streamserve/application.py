"""The API over built parts: what a server listens with, and an engine in this process is called through.

Owns nothing; composes. Knows nothing of sockets.
"""

from dataclasses import asdict
from typing import Any

from streamserve.api.app import Api, create_app
from streamserve.api.encoders import EncoderModel
from streamserve.api.playground import Playground
from streamserve.api.response_store import ResponseStore
from streamserve.api.service import Meter
from streamserve.build import Built
from streamserve.config import Config, served_names, shown_settings

SOME_RUNNING = 128  # where nothing says how many requests run at once


def app_of(
    config: Config,
    built: Built,
    *,
    metrics: Meter | None = None,
    response_store: ResponseStore | None = None,
    page: Playground | None = None,
) -> Api:
    """The application of these parts. To be made on the event loop that it runs on."""
    encoder = None
    if built.encoder is not None:
        encoder = EncoderModel(built.encoder.name, built.encoder.embedder, built.encoder.text)
    return create_app(
        built.engine,
        built.text,
        config.server,
        model_name=built.model_name,
        aliases=served_names(config)[1:],
        settings=settings_of(config, built),
        response_store=response_store,
        metrics=metrics,
        sampling_defaults=config.model.sampling_defaults,
        encoder=encoder,
        family=built.pictures,
        page=page,
    )


def num_in_flight(config: Config, built: Built) -> int:
    """Requests of a batch under way: twice what runs at once, so that the next ones wait at the engine's door and not outside."""
    running = config.scheduler.max_running_requests
    if running is None:
        running = SOME_RUNNING if built.resolved is None else built.resolved.max_running_requests
    return max(1, min(2 * running, config.scheduler.max_queued_requests))


def settings_of(config: Config, built: Built) -> dict[str, Any]:
    """What /server_info shows: every setting, and what was decided where one was left open."""
    shown = shown_settings(config)
    if built.resolved is not None:
        shown |= {"resolved": {name: value for name, value in asdict(built.resolved).items() if name != "reasons"}}
    return shown
