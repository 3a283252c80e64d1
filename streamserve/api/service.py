"""What every route shares: the engine's client, the text model, the settings, the runs that are live.

Owns the set of live runs and what is said of them when they end. Knows nothing of message formats.
"""

from asyncio import TimerHandle, get_running_loop
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

import structlog
from anyio import CapacityLimiter, Event, to_thread
from starlette.types import Scope

from streamserve.api.auth import OWNER, Door, given_key
from streamserve.api.encoders import EncoderModel
from streamserve.api.pictures import Caller, Pictures
from streamserve.api.prompts import Prompts
from streamserve.api.resume import Streams
from streamserve.api.schema import PictureRef
from streamserve.api.stream import Call, Pace, Piece, Run, Watch
from streamserve.api.wire import Exchange, digest_of, leaving_noticed
from streamserve.config import ServerConfig
from streamserve.engine.client import EngineClient
from streamserve.errors import InvalidRequest, ModelNotFound, StreamServeError
from streamserve.media.family import Family, Prepared
from streamserve.media.loader import Loader
from streamserve.messages import IMAGE, EngineLoad
from streamserve.text.model import TextModel

log = structlog.get_logger(__name__)
T = TypeVar("T")
MIB = 1 << 20
INLINE_LOGPROBS = 256  # with 20 alternatives each some 5 ms
MAX_DEADLINE_S = 86_400.0
ANY = "*"  # among a model's aliases: whatever name comes is taken for it


class Meter(Watch, Protocol):
    """Where the API reports what it did; metrics.Metrics is one."""

    def request_finished(
        self,
        outcome: str,
        *,
        seconds: float,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        generation_tokens: int = 0,
        num_images: int = 0,
    ) -> None: ...

    def render(self, load: EngineLoad | None = None) -> tuple[bytes, str]: ...

    @property
    def drafts(self) -> tuple[int, int]: ...


# What a request may leave to the model's own settings.
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


def _known_defaults(given: Mapping[str, float]) -> dict[str, Any]:
    known = {name: given[name] for name in SAMPLING_FIELDS if name in given}
    return {name: int(value) if name == "top_k" else value for name, value in known.items()}


class Service:
    """One served model."""

    def __init__(
        self,
        client: EngineClient,
        text: TextModel,
        config: ServerConfig,
        *,
        model_name: str,
        aliases: tuple[str, ...],
        sampling_defaults: str,
        meter: Meter | None,
        settings: Mapping[str, Any] | None = None,
        encoder: EncoderModel | None = None,
        family: Family | None = None,
        loader: Loader | None = None,
    ) -> None:
        self.client = client
        self.text = text
        self.config = config
        self.model_name = model_name
        self.aliases = aliases
        self.settings = settings or {}
        self.encoder = encoder
        self.defaults = _known_defaults(text.defaults) if sampling_defaults == "model" else {}
        self.meter = meter
        self.door = Door(config)
        self.prompts = Prompts(text, client.facts, family)
        self.pictures = None
        if family is not None and loader is not None:
            self.pictures = Pictures(family, loader, lambda: client.facts().context_len)
        self._pace = Pace(config.send_interval_ms)
        self.max_body_bytes = config.max_body_mb * MIB
        self.streams = Streams(
            self.live,
            window_s=config.resume_window_s,
            keep_alive_s=config.keep_alive_s,
            max_body_bytes=self.max_body_bytes,
            needs_key=self.door.needs_key,
        )
        self.closing = Event()
        self._runs: set[Run] = set()
        self._limiter = CapacityLimiter(1)  # threads for many log-probabilities
        self.checks = CapacityLimiter(1)  # threads that look through batches: several leave the loop no turn

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound unless the name, where one is given, is the served model's: the one that generates text."""
        if self.encoder is not None and name == self.encoder.name:
            raise ModelNotFound(f"model {name!r} generates no text; it answers {self.encoder.routes}", param="model")
        if name is not None and name != self.model_name and name not in self.aliases and ANY not in self.aliases:
            raise ModelNotFound(f"model {name[:200]!r} is not served here; {self.model_name!r} is", param="model")

    def encoder_named(self, name: str | None) -> EncoderModel:
        """The embedding model that a request means: by its name, or the only one. Raises ModelNotFound or InvalidRequest."""
        if self.encoder is not None:
            takes_any = ANY in self.aliases and name not in (self.model_name, *self.aliases)
            if takes_any or name in (None, self.encoder.name):
                return self.encoder
        if name is None:
            raise InvalidRequest("no embedding model is served; start the server with --embedding-model", param="model")
        self.check_model(name)
        other = f"{self.encoder.name!r} does" if self.encoder else "start the server with --embedding-model for that"
        raise InvalidRequest(f"model {name[:200]!r} generates text and does not embed it; {other}", param="model")

    def owner_of(self, scope: Scope) -> str:
        """In whose name things are kept: the key's. Without keys on the server, everybody's."""
        inside: str | None = scope.get(OWNER)
        return self.owner_with(given_key(scope) or b"") if inside is None else inside

    def owner_with(self, key: bytes) -> str:
        """The owner with that key."""
        return digest_of(key).hex() if self.door.needs_key else ""

    def caller(self, exchange: Exchange) -> Caller:
        """Who asks over HTTP. They may leave while their pictures are loaded."""
        return Caller(self.owner_of(exchange.scope), partial(leaving_noticed, exchange, lambda: None))

    @property
    def takes_pictures(self) -> bool:
        """Whether the model can be shown any."""
        return IMAGE in self.takes

    @property
    def takes(self) -> frozenset[str]:
        """Kinds of media that the model takes: image, video, audio."""
        return frozenset() if self.pictures is None else self.pictures.takes

    async def prepared(
        self, pictures: Sequence[PictureRef], caller: Caller, known: dict[str, Prepared] | None = None
    ) -> list[Prepared]:
        """See Pictures. Whoever reads a body has refused pictures where the model takes none."""
        if not pictures:
            return []
        assert self.pictures is not None
        return await self.pictures.prepared(pictures, caller, known)

    def run(self, call: Call) -> Run:
        """A run of `call` that is not started yet. Raises InvalidRequest for a deadline out of range."""
        if call.deadline_s is not None and not 0 < call.deadline_s <= MAX_DEADLINE_S:
            raise InvalidRequest(
                f"timeout is {call.deadline_s:g}; allowed is above 0 up to {MAX_DEADLINE_S:g} seconds", param="timeout"
            )
        return Run(self.client, self.text.tokenizer, call, self.meter, self.prompts.answers, self._pace)

    @contextmanager
    def live(self, run: Run) -> Iterator[None]:
        """While the body runs, `run` can be found by /abort, and its deadline is watched; afterwards nothing of it is left, and
        it is counted."""
        started = monotonic()
        self._runs.add(run)
        timer = self._watch_deadline(run)
        outcome = "abort"
        try:
            yield
            outcome = run.outcome
        except StreamServeError as error:
            outcome = error.code
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._runs.discard(run)
            run.abort()
            self._report(run, outcome, monotonic() - started)

    def _watch_deadline(self, run: Run) -> TimerHandle | None:
        limits = [limit_s for limit_s in (run.call.deadline_s, self.config.request_timeout_s) if limit_s]
        return get_running_loop().call_later(min(limits), run.expire, min(limits)) if limits else None

    def _report(self, run: Run, outcome: str, seconds: float) -> None:
        usage = run.usage
        self.report(
            outcome,
            seconds,
            id=run.call.id,
            client_id=run.call.client_id,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            num_images=usage.num_images,
        )

    def report(
        self,
        outcome: str,
        seconds: float,
        *,
        id: str,
        client_id: str | None = None,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        num_images: int = 0,
    ) -> None:
        """Count a request that has ended, and log it where that is asked for."""
        if self.meter is not None:
            self.meter.request_finished(
                outcome,
                seconds=seconds,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                generation_tokens=completion_tokens,
                num_images=num_images,
            )
        if self.config.log_requests:
            log.info(
                "request_finished",
                id=id,
                client_id=client_id,
                outcome=outcome,
                seconds=round(seconds, 3),
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=completion_tokens,
                **({"num_images": num_images} if num_images else {}),
            )

    async def spelt_out(self, make: Callable[[], T], pieces: Sequence[Piece]) -> T:
        """What `make` makes of these pieces: in a worker thread where their log-probabilities are so many that everybody else
        would wait for it."""
        if sum(len(piece.logprobs) + len(piece.prompt_logprobs or ()) for piece in pieces) <= INLINE_LOGPROBS:
            return make()
        return await to_thread.run_sync(make, limiter=self._limiter)

    def named(self, name: str) -> list[Run]:
        """The live runs of that very id, or of that name given by their client."""
        return [run for run in self._runs if name in (run.call.id, run.call.client_id)]

    def names_of_runs(self) -> dict[str, str | None]:
        """Of every live run, by its id, the name that its client gave it."""
        return {run.call.id: run.call.client_id for run in self._runs}

    def abort(self, prefix: str) -> int:
        """Abort the live runs whose id, or the name their client gave them, starts with `prefix`; "" means all."""
        named = [run for run in self._runs if run.call.is_named(prefix)]
        for run in named:
            run.abort()
        return len(named)
