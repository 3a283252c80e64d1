"""Routes for operators: health, readiness, metrics, the prefix cache, the served model's card.

Owns the shapes of these answers, which are SGLang's where it has such a route. Knows nothing of generation.
"""

from dataclasses import asdict
from datetime import UTC, datetime
from time import monotonic, time
from typing import Any
from urllib.parse import parse_qsl

from anyio import move_on_after, sleep

from streamserve import __version__
from streamserve.api.auth import given_key
from streamserve.api.encoders import EncoderModel
from streamserve.api.prefixes import preview
from streamserve.api.results import CacheInfo, Done, Loads, ModelCard, ModelInfo, ModelList, ServerInfo, Status
from streamserve.api.routes import Key, RouteSpec
from streamserve.api.service import ANY, Service
from streamserve.api.stream import new_id
from streamserve.api.wire import Exchange
from streamserve.engine.client import collect
from streamserve.errors import EngineStopped, InvalidRequest, ModelNotFound, NotFound, QueueFull
from streamserve.media.loader import MAX_PICTURES
from streamserve.messages import AUDIO, IMAGE, VIDEO, FinishReason, GenerateRequest, PrefixSummary, SamplingParams

PROBE_WAIT_S = 20.0  # SGLang's time to a health check's token
MAX_FLUSH_WAIT_S = 600.0
LOOK_EVERY_S = 0.01
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")

FLUSH_QUERY = (("timeout", "seconds to wait for running requests to end, at most 600; 0 refuses at once"),)


class Admin:
    """These routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time())

    def routes(self) -> list[RouteSpec]:
        """What there is here. get_… are SGLang's older names."""
        return [
            RouteSpec("GET", "/v1/models", self.models, result=ModelList),
            RouteSpec("GET", "/v1/models/{model_id:path}", self.model, result=ModelCard),
            RouteSpec("GET", "/health", self.health, result=Status, key=Key.NONE),
            RouteSpec("GET", "/health_generate", self.health_generate, result=Status, key=Key.NONE),
            RouteSpec("GET", "/ready", self.ready, result=Status, key=Key.NONE),
            RouteSpec("GET", "/ping", self.ping, result=Status),
            RouteSpec("GET", "/metrics", self.metrics, media="text/plain", key=Key.NONE, errors=(404,)),
            RouteSpec("GET", "/cache", self.cache, result=CacheInfo),
            *(RouteSpec("GET", path, self.model_info, result=ModelInfo) for path in ("/model_info", "/get_model_info")),
            *(RouteSpec("GET", path, self.server_info, result=ServerInfo) for path in ("/server_info", "/get_server_info")),
            RouteSpec("GET", "/v1/loads", self.loads, result=Loads),
            *(
                RouteSpec(method, "/flush_cache", self.flush_cache, result=Done, key=Key.ADMIN, query=FLUSH_QUERY)
                for method in ("GET", "POST")
            ),
        ]

    async def health(self, exchange: Exchange) -> None:
        """GET /health: whether the engine's loop is alive. Generates nothing."""
        facts = self._service.client.facts()
        if not facts.is_healthy:
            raise EngineStopped("the engine has stopped; see the server's log")
        await exchange.answer_json({"status": "ready" if facts.is_ready else "draining"})

    async def health_generate(self, exchange: Exchange) -> None:
        """GET /health_generate: whether a token can be generated, now."""
        client = self._service.client
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        request = GenerateRequest(new_id("health"), (0,), params)
        finish = None
        try:
            with move_on_after(PROBE_WAIT_S):
                finish = (await collect(await client.submit(request))).finish_reason
        except QueueFull as full:
            raise EngineStopped(f"no token was generated: {full}") from None
        finally:
            client.abort(request.id)
        if finish not in (FinishReason.STOP, FinishReason.LENGTH):
            raise EngineStopped(f"no token was generated within {PROBE_WAIT_S:g} s")
        await exchange.answer_json({"status": "ready"})

    async def ping(self, exchange: Exchange) -> None:
        """GET /ping: that somebody answers."""
        await exchange.answer_json({"status": "ok"})

    async def ready(self, exchange: Exchange) -> None:
        """GET /ready: whether requests are taken."""
        facts = self._service.client.facts()
        if not (facts.is_healthy and facts.is_ready):
            raise EngineStopped("the server takes no requests: it is starting or shutting down")
        await exchange.answer_json({"status": "ready"})

    async def metrics(self, exchange: Exchange) -> None:
        """GET /metrics: counters, gauges and histograms for Prometheus."""
        if self._service.meter is None:
            raise NotFound("this server keeps no metrics")
        page, content_type = self._service.meter.render(self._service.client.facts().load)
        await exchange.answer(200, page, content_type.encode())

    async def cache(self, exchange: Exchange) -> None:
        """GET /cache: the prefix tree in numbers. Texts of prefixes only where nobody else's can be read."""
        summary = self._service.client.cache_summary()
        shows_text = self._service.door.may_see_texts(exchange.scope, given_key(exchange.scope))
        answer = asdict(summary)
        answer["hit_rate"] = summary.hit_rate
        answer["top_prefixes"] = [self._prefix(prefix, shows_text) for prefix in summary.top_prefixes]
        await exchange.answer_json(answer)

    def _prefix(self, prefix: PrefixSummary, shows_text: bool) -> dict[str, Any]:
        answer = asdict(prefix)
        first = answer.pop("first_token_ids")
        answer["preview"] = preview(self._service.text.tokenizer, first) if shows_text else None
        return answer

    async def flush_cache(self, exchange: Exchange) -> None:
        """GET or POST /flush_cache: forget every cached prefix that is not pinned. While requests run that is refused, or
        waited for (`timeout`)."""
        wait_s = timeout_of(exchange)
        until = monotonic() + wait_s
        client = self._service.client
        while not client.flush_cache():
            if monotonic() >= until:
                load = client.facts().load
                raise InvalidRequest(
                    f"{load.running} requests run and {load.waiting} wait: the cache cannot be forgotten now; "
                    f"?timeout=SECONDS waits for them",
                    param="timeout",
                )
            await sleep(LOOK_EVERY_S)
        kept = client.cache_summary(0).pins
        stays = f"what is not pinned is forgotten; {kept.num_pins} pins keep {kept.pinned_tokens} tokens"
        await exchange.answer_json({"success": True, "message": stays if kept.num_pins else "the cache is empty"})

    async def model_info(self, exchange: Exchange) -> None:
        """GET /model_info: what the served model is and takes."""
        service, facts = self._service, self._service.client.facts()
        await exchange.answer_json(
            {
                "model_path": service.settings.get("model_path") or service.model_name,
                "served_model_name": service.model_name,
                "tokenizer_path": service.settings.get("tokenizer_path")
                or service.settings.get("model_path")
                or service.model_name,
                "is_generation": True,
                "preferred_sampling_params": dict(service.defaults) or None,
                "weight_version": "default",
                "has_image_understanding": service.takes_pictures,
                "has_audio_understanding": AUDIO in service.takes,
                "image_limits": image_limits(self._service),
                "chat_template": chat_template(self._service),
                "max_model_len": facts.context_len,
                "vocab_size": facts.vocab_size,
                "eos_token_ids": sorted(facts.eos_token_ids),
            }
        )

    async def server_info(self, exchange: Exchange) -> None:
        """GET /server_info: the settings, what was decided where one was open, and the engine's state. No secrets."""
        facts = self._service.client.facts()
        state = {
            **asdict(facts.load),
            "is_healthy": facts.is_healthy,
            "is_ready": facts.is_ready,
            "page_size": facts.page_size,
            "cache_hit_rate": self._service.client.cache_summary(0).hit_rate,
            **self._drafts(),
        }
        await exchange.answer_json(
            {
                **self._service.settings,
                "served_model_name": self._service.model_name,
                "max_total_num_tokens": facts.load.total_tokens,
                "context_length": facts.context_len,
                "version": __version__,
                "internal_states": [state],
            }
        )

    def _drafts(self) -> dict[str, float]:
        """What speculation has come to since the start; the rate where there was any."""
        if self._service.meter is None:
            return {}
        num_drafted, num_accepted = self._service.meter.drafts
        rate = {"spec_accept_rate": num_accepted / num_drafted} if num_drafted else {}
        return {"drafted_tokens": num_drafted, "accepted_tokens": num_accepted, **rate}

    async def loads(self, exchange: Exchange) -> None:
        """GET /v1/loads: running and waiting requests, KV tokens; under SGLang's names as well."""
        load = self._service.client.facts().load
        used = load.total_tokens - load.free_tokens - load.evictable_tokens
        rank = {
            "dp_rank": 0,
            "num_running_reqs": load.running,
            "num_waiting_reqs": load.waiting,
            "num_total_reqs": load.running + load.waiting,
            "num_used_tokens": used,
            "max_total_num_tokens": load.total_tokens,
            "token_usage": round(used / load.total_tokens, 4) if load.total_tokens else 0.0,
        }
        await exchange.answer_json(
            {**asdict(load), "timestamp": time(), "version": __version__, "dp_rank_count": 1, "loads": [rank]}
        )

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models: the served model, under each of its names."""
        names = [name for name in (self._service.model_name, *self._service.aliases) if name != ANY]
        encoder = self._service.encoder
        cards = [self._card(name) for name in names] + ([self._encoder_card(encoder)] if encoder is not None else [])
        ids = [card["id"] for card in cards] or [None]
        page = {"first_id": ids[0], "last_id": ids[-1], "has_more": False}  # for Anthropic's clients
        await exchange.answer_json({"object": "list", "data": cards, **page})

    async def model(self, exchange: Exchange) -> None:
        """GET /v1/models/{id}: one name of the served model."""
        name: str = exchange.scope["path_params"]["model_id"]
        if name == ANY:
            raise ModelNotFound(f"model {name!r} is not served here; {self._service.model_name!r} is", param="model")
        encoder = self._service.encoder
        if encoder is not None and name == encoder.name:
            await exchange.answer_json(self._encoder_card(encoder))
            return
        self._service.check_model(name)
        await exchange.answer_json(self._card(name))

    def _encoder_card(self, encoder: EncoderModel) -> dict[str, Any]:
        return self._head(encoder.name, encoder.name, encoder.facts.max_len)

    def _card(self, name: str) -> dict[str, Any]:
        head = self._head(name, self._service.model_name, self._service.client.facts().context_len)
        modalities = ["text", *sorted(self._service.takes, key=(IMAGE, VIDEO, AUDIO).index)]
        return {**head, "sampling_defaults": dict(self._service.defaults), "input_modalities": modalities}

    def _head(self, name: str, root: str, max_len: int) -> dict[str, Any]:
        """What is said of every model: in OpenAI's words, then vLLM's, then in those that Anthropic's clients look for."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "streamserve",
            "root": root,
            "parent": None,
            "max_model_len": max_len,
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(self._created, UTC).isoformat(),
            "max_input_tokens": max_len,
            "max_tokens": max_len,
            "lifecycle": "active",
        }


def image_limits(service: Service) -> dict[str, Any] | None:
    """What pictures a request may have, for pages that look before they send."""
    if not service.takes_pictures:
        return None
    max_bytes = service.max_body_bytes
    return {"max_images": MAX_PICTURES, "max_file_bytes": max_bytes, "max_body_bytes": max_bytes, "types": MEDIA_TYPES}


def chat_template(service: Service) -> dict[str, Any] | None:
    """How this model writes conversations, for programs that write their prompts themselves (lang/roles.py). `image_marker`: what
    it writes for a picture."""
    template = service.text.template
    if template is None:
        return None
    return {
        "source": template.plain_source,
        "special_tokens": dict(template.special_tokens),
        "image_marker": service.prompts.image_marker,
    }


def timeout_of(exchange: Exchange) -> float:
    """`?timeout=SECONDS`, 0 where it is not given. Raises InvalidRequest for anything else in the query."""
    seconds = 0.0
    for name, value in parse_qsl(exchange.scope["query_string"].decode("latin1"), keep_blank_values=True):
        if name != "timeout":
            raise InvalidRequest(f"unknown parameter {name[:200]!r}; timeout is one", param=name[:200])
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= MAX_FLUSH_WAIT_S:
            raise InvalidRequest(f"timeout is {value[:200]!r}; allowed is 0 to {MAX_FLUSH_WAIT_S:g} seconds", param="timeout")
    return seconds
