"""Whether answers could be held to a form, for whoever is still writing it: as a chat would find out, without one.

Owns this route. Knows nothing of what the fields mean (api/forms.py) or of how a grammar is compiled.
"""

from typing import Any

from msgspec.structs import asdict

from streamserve.api.forms import Forms
from streamserve.api.results import FormChecked
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import ChatRequest, Formed, ToolDefinition, convert, load_object
from streamserve.api.service import Service
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest, QueueFull

MAX_CHECKS = 8  # at once: grammars of requests are not to wait behind many that nobody has finished writing


class FormRequest(Formed, kw_only=True):
    """Body of POST /forms/check: those fields of a chat that say what form its answer has."""

    model: str | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class FormCheck:
    """This route."""

    def __init__(self, service: Service, forms: Forms) -> None:
        self._service = service
        self._forms = forms
        self._num_checks = 0

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        example = {"regex": "[0-9]{4}-[0-9]{2}"}
        return [RouteSpec("POST", "/forms/check", self.check, FormRequest, FormChecked, example=example)]

    async def check(self, exchange: Exchange) -> None:
        """POST /forms/check: whether answers could be held to this form, or calls to these tools, and why not. Nothing is
        generated or kept."""
        given = convert(load_object(await exchange.body(self._service.max_body_bytes)), FormRequest)
        self._service.check_model(given.model)
        if self._num_checks >= MAX_CHECKS:
            raise QueueFull(f"{self._num_checks} forms are being checked already", retry_after_s=1)
        self._num_checks += 1
        try:
            warnings, error = await self._problems(ChatRequest(messages=[], **asdict(given))), None
        except InvalidRequest as refusal:
            warnings, error = (), {"message": str(refusal), "param": refusal.param, "code": refusal.code}
        finally:
            self._num_checks -= 1
        await exchange.answer_json({"valid": error is None, "error": error, "warnings": warnings})

    async def _problems(self, request: ChatRequest) -> tuple[str, ...]:
        """Warnings. Raises what the chat would be refused with."""
        form = await self._forms.of_chat(request)
        if form.grammar is not None:
            await self._service.client.check_grammar(form.grammar, form.param)
        return form.warnings
