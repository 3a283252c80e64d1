"""Answers of the Responses API as types: what /openapi.json promises of them, as api/results.py does for the other routes.

Owns the promises only: answers are written by response_events.py and responses.py, nothing is made from these types.
"""

from typing import Any, Literal

from msgspec import Struct


class InputTokensDetails(Struct):
    """Of a response's input."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Struct):
    """Of a response's output."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Struct):
    """Why a response has failed."""

    code: str
    message: str


class IncompleteDetails(Struct):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class OutputItem(Struct):
    """A message, a reasoning or a call of a function. What further fields there are depends on the type."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseObject(Struct):
    """A response, under way or over, and what its request asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]
    background: bool
    model: str
    output: list[OutputItem]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    metadata: dict[str, str]
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    store: bool


class ResponseEvent(Struct):
    """An event of a response's making. What further fields there are depends on the type."""

    type: str
    sequence_number: int


class ResponseDeleted(Struct):
    """A response was forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItem(Struct):
    """An item of a response's input. What further fields there are depends on the type."""

    id: str
    type: Literal["message", "reasoning", "function_call", "function_call_output"]
    status: str


class InputItemList(Struct):
    """A page of input items."""

    object: Literal["list"]
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(Struct):
    """How many tokens an input makes."""

    object: Literal["response.input_tokens"]
    input_tokens: int
