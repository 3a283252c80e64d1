"""Routes for operators: health, readiness, metrics, the prefix cache, the served model's card.

Owns the shapes of these answers. Knows nothing of generation.
"""

from dataclasses import asdict
from time import time
from typing import Any

from streamserve.api.service import Service
from streamserve.api.wire import Exchange
from streamserve.errors import EngineStopped, ModelNotFound, NotFound
from streamserve.messages import PrefixSummary


class Admin:
    """These routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time())

    async def health(self, exchange: Exchange) -> None:
        """GET /health: whether the engine's loop is alive. Generates nothing."""
        facts = self._service.client.facts()
        if not facts.is_healthy:
            raise EngineStopped("the engine has stopped; see the server's log")
        await exchange.answer_json({"status": "ready" if facts.is_ready else "draining"})

    async def ready(self, exchange: Exchange) -> None:
        """GET /ready: whether requests are taken."""
        facts = self._service.client.facts()
        if not (facts.is_healthy and facts.is_ready):
            raise EngineStopped("the server takes no requests: it is starting or shutting down")
        await exchange.answer_json({"status": "ready"})

    async def metrics(self, exchange: Exchange) -> None:
        """GET /metrics, for Prometheus"""
        if self._service.meter is None:
            raise NotFound("this server keeps no metrics")
        page, content_type = self._service.meter.render(self._service.client.facts().load)
        await exchange.answer(200, page, content_type.encode())

    async def cache(self, exchange: Exchange) -> None:
        """GET /cache: the prefix tree in numbers. Texts of prefixes only where nobody else's can be read."""
        summary = self._service.client.cache_summary()
        shows_text = self._service.door.may_see_texts(exchange.scope)
        answer = asdict(summary)
        answer["hit_rate"] = summary.hit_rate
        answer["top_prefixes"] = [self._prefix(prefix, shows_text) for prefix in summary.top_prefixes]
        await exchange.answer_json(answer)

    def _prefix(self, prefix: PrefixSummary, shows_text: bool) -> dict[str, Any]:
        answer = asdict(prefix)
        first = answer.pop("first_token_ids")
        answer["preview"] = self._service.text.tokenizer.decode(first, skip_special_tokens=False) if shows_text else None
        return answer

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models"""
        names = (self._service.model_name, *self._service.aliases)
        await exchange.answer_json({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, exchange: Exchange) -> None:
        """GET /v1/models/{id}"""
        name: str = exchange.scope["path_params"]["model_id"]
        if name != self._service.model_name and name not in self._service.aliases:
            raise ModelNotFound(f"model {name[:200]!r} is not served here; {self._service.model_name!r} is", param="model")
        await exchange.answer_json(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "streamserve",
            "root": self._service.model_name,
            "parent": None,
            "max_model_len": self._service.client.facts().context_len,
            "sampling_defaults": dict(self._service.defaults),
        }
