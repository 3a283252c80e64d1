"""/openapi.json: an OpenAPI 3.1 document of every route, made from the route table and the types that check bodies.

Owns how types and routes are said in that language. Knows no route by its path but for the shape of its errors.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import cleandoc
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
import orjson
from msgspec import Struct

from streamserve import __version__
from streamserve.api.fields import TABLES, Decision, Field
from streamserve.api.generate_schema import NativeRequest, NativeSampling
from streamserve.api.prefixes import LookupRequest
from streamserve.api.results import AnthropicErrorAnswer, ErrorAnswer
from streamserve.api.routes import Key, RouteSpec
from streamserve.api.schema import (
    MAX_CHOICES_PER_PROMPT,
    MAX_NAME_CHARS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    ROLES,
    AbortRequest,
    Message,
    TokenizeRequest,
)
from streamserve.api.service import MAX_DEADLINE_S
from streamserve.api.wire import Exchange
from streamserve.messages import MAX_LOGIT_BIAS, RANGES

REF = "#/components/schemas/{name}"
# Names that fields of bodies have for a sampling parameter, beside its own.
ALSO_NAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "sampling_seed": "seed",
    "top_logprobs": "logprobs",
    "top_logprobs_num": "logprobs",
}
# What checks of bodies ask of a field beyond its type and the ranges of sampling parameters.
ASKED: Mapping[str, Mapping[str, Any]] = {
    "n": {"minimum": 1, "maximum": MAX_CHOICES_PER_PROMPT},
    "timeout": {"exclusiveMinimum": 0, "maximum": MAX_DEADLINE_S},
    "rid": {"minLength": 1, "maxLength": MAX_NAME_CHARS},
    "request_id": {"minLength": 1, "maxLength": MAX_NAME_CHARS},
    "stop": {"minLength": 1, "maxLength": MAX_STOP_CHARS, "maxItems": MAX_STOPS},
    "messages": {"minItems": 1},
    "role": {"enum": list(ROLES)},
    "cache_salt": {"maxLength": 256},
    "extra_key": {"maxLength": 256},
    "logit_bias": {"maxProperties": MAX_LOGIT_BIAS},
    "top_k": {"minimum": -1, "maximum": 10_000_000},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 2},
}
# Of these fields of a body one has to be there.
ONE_OF: Mapping[str, tuple[str, ...]] = {
    NativeRequest.__name__: ("text", "input_ids"),
    TokenizeRequest.__name__: ("prompt", "messages"),
    LookupRequest.__name__: ("prompt", "messages"),
    AbortRequest.__name__: ("rid", "abort_all"),
}
KEYWORDS = {"string": {"minLength", "maxLength", "enum"}, "array": {"minItems", "maxItems"}, "object": {"maxProperties"}}
NUMERIC = {"minimum", "maximum", "exclusiveMinimum"}
# Fields that a type leaves open because their checks name what is wrong better than it could.
REFINED: Mapping[tuple[str, str], type[Struct]] = {(NativeRequest.__name__, "sampling_params"): NativeSampling}
ERRORS = {
    400: "A field has a wrong type or value, or is unknown; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "A page of this origin may not call the server (--cors-origins).",
    404: "There is no such model or object.",
    409: "It cannot be done as things stand now; the message says why.",
    413: "The body is over --max-body-mb, or there is no room for what it holds.",
    429: "Too many requests wait; the header Retry-After says when to come back.",
    500: "The server failed.",
    503: "The server is starting, shutting down or broken.",
    504: "The time that the request or the server allows was over.",
}
ABOUT = (
    "Errors have OpenAI's shape, and the same fields beside it; /v1/messages has Anthropic's. Unknown fields of a body are "
    "errors; null stands for a field that is left out. WebSockets at /v1/ws carry the same bodies and chunks: docs/websocket.md."
)


class OpenApi:
    """The document of one server. Made when it is first asked for."""

    def __init__(self, routes: Sequence[RouteSpec], *, needs_key: bool) -> None:
        self._routes = routes
        self._needs_key = needs_key
        self._document: bytes | None = None

    async def show(self, exchange: Exchange) -> None:
        """GET /openapi.json: this document."""
        if self._document is None:
            self._document = orjson.dumps(document(self._routes, needs_key=self._needs_key))
        await exchange.answer(200, self._document)


def document(routes: Iterable[RouteSpec], *, needs_key: bool) -> dict[str, Any]:
    """The whole document."""
    shown = [route for route in routes if route.is_shown]
    schemas = _Schemas(shown)
    paths: dict[str, dict[str, Any]] = {}
    for route in shown:
        paths.setdefault(re.sub(r":\w+}", "}", route.path), {})[route.method.lower()] = _operation(route, schemas, needs_key)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "StreamServe", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": schemes},
    }


class _Schemas:
    """JSON schemas of every type that a route names."""

    def __init__(self, routes: Sequence[RouteSpec]) -> None:
        types: dict[Any, None] = {ErrorAnswer: None, AnthropicErrorAnswer: None, **dict.fromkeys(REFINED.values())}
        bodies: dict[type[Struct], None] = {}
        for route in routes:
            for kind in (route.body, route.result, route.event):
                types |= dict.fromkeys(_kinds(kind))
            if route.body is not None:
                bodies[route.body] = None
        schemas, self.components = msgspec.json.schema_components(types, ref_template=REF)
        self._schemas = dict(zip(types, schemas, strict=True))
        for body in (*bodies, *REFINED.values()):
            _as_checked(self._component(body))
        for route in routes:
            if route.body is not None:
                _describe(self._component(route.body), TABLES.get(f"{route.method} {route.path}", ()))
        for component in self.components.values():
            if "description" in component:
                component["description"] = cleandoc(component["description"])
            if component.get("title") == Message.__name__ and "role" in component["properties"]:
                _narrow(component)
        for (name, field), kind in REFINED.items():
            properties = next(c["properties"] for c in self.components.values() if c.get("title") == name)
            one = self.of(kind)
            properties[field] = {"anyOf": [one, {"type": "array", "items": one}, {"type": "null"}]}

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type that a route names."""
        schemas: list[dict[str, Any]] = [self._schemas[one] for one in _kinds(kind)]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _component(self, kind: type[Struct]) -> dict[str, Any]:
        name: str = self._schemas[kind]["$ref"].rsplit("/", 1)[1]
        component: dict[str, Any] = self.components[name]
        return component


def _kinds(kind: Any) -> tuple[Any, ...]:
    """A type's alternatives. Answers of one route may differ in ways that msgspec could not tell apart when it reads."""
    if kind is None:
        return ()
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _as_checked(schema: dict[str, Any]) -> None:
    """What schema.convert() does beyond the type: unknown fields are refused, null means "not given", numbers have ranges."""
    schema["additionalProperties"] = False
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and not any(one.get("type") == "null" for one in field.get("anyOf", ())):
            default = {"default": field.pop("default")} if "default" in field else {}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **default}
    if schema["title"] in ONE_OF:
        schema["anyOf"] = [{"required": [name]} for name in ONE_OF[schema["title"]]]
    _narrow(schema)


def _describe(schema: dict[str, Any], notes: Iterable[Field]) -> None:
    """Say of each field what api/fields.py decides of it."""
    for note in notes:
        if note.name in schema["properties"] and note.note:
            without = note.decision is Decision.WARNED
            schema["properties"][note.name]["description"] = f"No effect: {note.note}" if without else note.note


def _narrow(schema: dict[str, Any]) -> None:
    """Say of each field what its checks ask of it, unless its type says so itself."""
    ranges = {name: {"minimum": low, "maximum": high} for name, low, high in RANGES}
    for name, field in schema["properties"].items():
        asked = ASKED.get(name) or ranges.get(ALSO_NAMED.get(name, name)) or {}
        for option in field.get("anyOf", [field]):
            known = KEYWORDS.get(option.get("type"), NUMERIC if option.get("type") in ("integer", "number") else set())
            option |= {keyword: value for keyword, value in asked.items() if keyword in known - option.keys()}


def _operation(route: RouteSpec, schemas: _Schemas, needs_key: bool) -> dict[str, Any]:
    summary, text = _described(route)
    operation: dict[str, Any] = {
        "summary": summary,
        "description": text,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        "responses": _responses(route, schemas),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"{(\w+)", route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "description": what, "schema": {"type": "string"}}
        for name, what in route.query
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content: dict[str, Any] = {"schema": schemas.of(route.body)}
        if route.example is not None:
            content["example"] = route.example
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    if route.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": route.form}}}
    operation["security"] = [] if route.key is Key.NONE else [{"bearer": []}, {"x-api-key": []}, *([] if needs_key else [{}])]
    return operation


def _described(route: RouteSpec) -> tuple[str, str]:
    """What a route does, in a line and in full: its answer's docstring, without the route that it begins with."""
    doc = cleandoc(route.answer.__doc__ or "")
    text = re.sub(r"^[A-Z]+ (or [A-Z]+ )?/\S*?(: |$)", "", doc, count=1, flags=re.MULTILINE).strip()
    text = text[:1].upper() + text[1:] or f"{route.method} {route.path.replace(':path', '')}"
    return re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].rstrip(":.").replace("\n", " "), text


def _responses(route: RouteSpec, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.result is not None:
        content["application/json"] = {"schema": schemas.of(route.result)}
    if route.event is not None:
        # OpenAPI 3.1 knows a body as a whole only: tools would hold a "schema" here against each event.
        content["text/event-stream"] = {"x-event-schema": schemas.of(route.event)}
    if route.media is not None:
        content[route.media] = {"schema": {"type": "string"}}
    answers: dict[str, Any] = {"200": {"description": "The answer.", **({"content": content} if content else {})}}
    error = schemas.of(AnthropicErrorAnswer if route.path.startswith("/v1/messages") else ErrorAnswer)
    for status in _statuses(route):
        answers[str(status)] = {"description": ERRORS[status], "content": {"application/json": {"schema": error}}}
    return answers


def _statuses(route: RouteSpec) -> list[int]:
    """Errors that a route can end with."""
    statuses = {500, 503, *route.errors}
    if route.key is not Key.NONE:
        statuses.add(401)
    if route.query:
        statuses.add(400)
    if route.method != "GET":
        statuses.add(403)
    if "{" in route.path:
        statuses.add(404)
    if route.body is not None:
        statuses |= {400, 404, 413, 429, 504}
    return sorted(statuses)
