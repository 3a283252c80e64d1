"""What the page has to know once, when it starts: the model, its limits, what this caller may do.

Owns the shape of that answer. Knows nothing of what the page makes of it.
"""

from streamserve import __version__
from streamserve.api.admin import image_limits
from streamserve.api.auth import given_key
from streamserve.api.forms import Forms
from streamserve.api.results import PageSettings
from streamserve.api.routes import RouteSpec
from streamserve.api.service import Service
from streamserve.api.wire import Exchange
from streamserve.messages import AUDIO, IMAGE, MAX_LOGPROBS, VIDEO


class PageConfig:
    """This route."""

    def __init__(self, service: Service, forms: Forms) -> None:
        self._service = service
        self._forms = forms

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        return [RouteSpec("GET", "/playground/config.json", self.show, result=PageSettings)]

    async def show(self, exchange: Exchange) -> None:
        """GET /playground/config.json: what a page needs to know of the server once: the model, its limits, and what the one who
        asks may do."""
        service, door = self._service, self._service.door
        facts, pins = service.client.facts(), service.client.cache_summary(0).pins
        why, key = door.why_no_texts(exchange.scope, given_key(exchange.scope)), given_key(exchange.scope)
        await exchange.answer_json(
            {
                "version": __version__,
                "model": service.model_name,
                "aliases": service.aliases,
                "context_len": facts.context_len,
                "max_body_bytes": service.max_body_bytes,
                "max_logprobs": MAX_LOGPROBS,
                "resume_window_s": service.config.resume_window_s,
                "sampling_defaults": dict(service.defaults),
                "image_limits": image_limits(service),
                "takes": {
                    "chat": service.text.template is not None,
                    "images": IMAGE in service.takes,
                    "videos": VIDEO in service.takes,
                    "sounds": AUDIO in service.takes,
                    "tools": service.text.template is not None,
                    "reasoning": self._forms.reasoning is not None,
                    "structure": True,
                    "predictions": facts.uses_predictions,
                },
                "cache": {
                    "page_size": facts.page_size,
                    "total_tokens": facts.load.total_tokens,
                    "reuse": not service.settings.get("disable_radix_cache", False),
                    "max_pinned_tokens": pins.max_pinned_tokens,
                },
                "allowed": {"previews": why is None, "previews_reason": why, "admin": door.is_admin(key)},
            }
        )
