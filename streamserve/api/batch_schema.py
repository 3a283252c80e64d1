"""A batch as clients see it, and what asks for one: OpenAI's Batch object. Knows nothing of how a batch is run."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, to_builtins

from streamserve.api.batch_ledger import Tally
from streamserve.api.batch_lines import Endpoint
from streamserve.api.batch_todo import BadInput
from streamserve.api.response_schema import check_metadata
from streamserve.api.schema import convert
from streamserve.errors import InvalidRequest, StreamServeError

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OVER = ("failed", "completed", "expired", "cancelled")
HOUR_S, MIN_TTL_S, MAX_TTL_S = 3_600, 3_600, 30 * 24 * 3_600


class OutputExpiry(Struct, forbid_unknown_fields=True):
    """How long the files of answers are kept, once they are made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]


class CreateBatch(Struct):
    """POST /v1/batches. `completion_window` is a number of hours, such as 24h."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Annotated[str, Meta(pattern="^[1-9][0-9]{0,2}h$")]
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiry | None = None

    @property
    def window_s(self) -> int:
        """The window in seconds."""
        return int(self.completion_window[:-1]) * HOUR_S


class LineError(Struct):
    """Why a batch has failed. `line` of the input is at fault, where one is."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Struct):
    """Why a batch has failed: the first hundred errors."""

    data: list[LineError]
    object: Literal["list"] = "list"


class RequestCounts(Struct, frozen=True):
    """Lines: all, those with an answer, those with an error. The rest is yet to come."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(Struct, frozen=True):
    """Of tokens that were read."""

    cached_tokens: int = 0


class OutputDetails(Struct, frozen=True):
    """Of tokens that were written."""

    reasoning_tokens: int = 0


class BatchUsage(Struct, frozen=True):
    """Tokens of all answers together."""

    input_tokens: int = 0
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int = 0


class Batch(Struct):
    """A batch. Times are in seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    model: str
    status: Status = "validating"
    object: Literal["batch"] = "batch"
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage = BatchUsage()
    metadata: dict[str, str] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.status in OVER

    def enter(self, status: Status, now_s: float) -> None:
        """Be in that state from now on."""
        self.status = status
        if status != "validating":
            setattr(self, f"{status}_at", int(now_s))

    def count(self, total: int, tally: Tally) -> None:
        """Take over what was counted."""
        self.request_counts = RequestCounts(total, tally.completed, tally.failed)
        used = tally.usage
        self.usage = BatchUsage(
            used.input_tokens,
            InputDetails(used.cached_tokens),
            used.output_tokens,
            OutputDetails(used.reasoning_tokens),
            used.input_tokens + used.output_tokens,
        )

    def fail(self, error: StreamServeError, now_s: float) -> None:
        """End, because of that."""
        found = list(error.errors) if isinstance(error, BadInput) else [error]
        lines = [LineError(one.code, str(one), getattr(one, "param", None), getattr(one, "line", None)) for one in found]
        self.errors = BatchErrors(lines)
        self.enter("failed", now_s)

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        shown: dict[str, Any] = to_builtins(self)
        return shown


class BatchList(Struct):
    """A page of batches."""

    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def read_create(given: Mapping[str, Any]) -> CreateBatch:
    """Raises InvalidRequest."""
    request = convert(given, CreateBatch)
    if not request.input_file_id:
        raise InvalidRequest("input_file_id is empty", param="input_file_id")
    check_metadata(request.metadata or {})
    return request
