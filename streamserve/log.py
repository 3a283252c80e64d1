"""Log set-up: one place where events go, ours and other libraries'. Torch-free.

Owns format and level. Our events are structlog's (`log.info("request_finished", id=..., tokens=...)`); the standard
library's loggers (hypercorn, transformers, asyncio) end in the same lines and are quiet: warnings and worse, all at debug.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import structlog
from structlog.typing import Processor

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str = "info", format: str = "auto", stream: TextIO | None = None) -> None:
    """Send every event of this process to `stream` (standard error), as console lines or JSON lines.

    `format` "auto" is JSON unless the stream is a terminal. Set up once per process; a later call replaces the earlier one."""
    stream = sys.stderr if stream is None else stream
    # transformers hangs a handler of its own on its logger while it is imported, and reads this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "debug" if level == "debug" else "error")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(is_json(format, stream), stream)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.getLogger("streamserve").setLevel(LEVELS[level])
    logging.captureWarnings(True)


def as_library(level: str) -> None:
    """Events as records of the standard library's loggers below `streamserve`, from `level` on. What becomes of them is the
    process's own affair; a structlog that it has configured stays as it is."""
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.contextvars.merge_contextvars,
                structlog.dev.ConsoleRenderer(0, colors=False, exception_formatter=structlog.dev.plain_traceback),
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=False,
        )
    logging.getLogger("streamserve").setLevel(LEVELS[level])


def is_json(format: str, stream: TextIO) -> bool:
    """Whether lines on `stream` are JSON."""
    return format == "json" or (format == "auto" and not stream.isatty())


def wants_colour(stream: TextIO) -> bool:
    """Terminals get colour, unless NO_COLOR says otherwise (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Every event inside, in this task and in tasks it starts, carries the request's id."""
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        yield


def _renderers(as_json: bool, stream: TextIO) -> list[Processor]:
    if as_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    return [structlog.dev.ConsoleRenderer(colors=wants_colour(stream), exception_formatter=structlog.dev.plain_traceback)]
