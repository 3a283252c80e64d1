"""Answers as types: what /openapi.json promises of them. tests/e2e/test_openapi.py holds a running server to it.

Owns the promises only: answers are written by whoever owns them, nothing is made from these types. More fields than are named
here may come with an answer; clients are to pass over what they do not know.
"""

from typing import Any, Literal

from msgspec import Struct

FinishReason = Literal["stop", "length", "tool_calls", "function_call", "abort"]


class ErrorFields(Struct):
    """What went wrong. `param` names the field at fault, where one is."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorAnswer(Struct):
    """OpenAI's nested `error`, and the same beside it, where other clients look."""

    error: ErrorFields
    object: Literal["error"]
    message: str
    type: str
    code: str
    param: str | None


class AnthropicErrorFields(Struct):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorAnswer(Struct):
    """An error as Anthropic's clients expect it."""

    type: Literal["error"]
    error: AnthropicErrorFields
    request_id: str


class PromptDetails(Struct):
    """Of a prompt's tokens."""

    cached_tokens: int


class CompletionDetails(Struct):
    """Of an answer's tokens: those of its thought, those that a grammar forced, and those that were guessed before they were
    sampled. Rejected ones are guesses that do not stand in it."""

    reasoning_tokens: int
    jumped_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(Struct):
    """Tokens of a request. Each prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatMessage(Struct):
    """An assistant's answer."""

    role: Literal["assistant"]
    content: str | None


class ChatChoice(Struct):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatCompletion(Struct):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChunkChoice(Struct):
    """What one of n answers gained."""

    index: int
    delta: dict[str, Any]
    finish_reason: FinishReason | None


class ChatChunk(Struct):
    """One event of a chat's stream. The last one before `[DONE]` has no choices and the usage, where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]


class TextChoice(Struct):
    """One of n completions of a prompt; of a stream's event, what it gained."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason | None


class TextCompletion(Struct):
    """The answer of POST /v1/completions, and an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]


class NativeMeta(Struct):
    """How an answer of /generate came about. `finish_reason` is null in a stream until the choice ends."""

    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class NativeAnswer(Struct):
    """One answer of POST /generate. `index` where there are several."""

    text: str
    output_ids: list[int]
    meta_info: NativeMeta
    index: int = 0


class ModelCard(Struct):
    """A name of the served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Struct):
    """All names."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Struct):
    """The answer of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class TokensText(Struct):
    """The answer of POST /detokenize, under vLLM's name and SGLang's."""

    prompt: str
    text: str


class ParsedCall(Struct):
    """One call; `parameters` is the JSON text of its arguments."""

    tool_index: int
    name: str
    parameters: str


class ParsedCalls(Struct):
    """The answer of POST /parse_function_call."""

    normal_text: str
    calls: list[ParsedCall]


class Separated(Struct):
    """The answer of POST /separate_reasoning."""

    reasoning_text: str
    text: str


class Aborted(Struct):
    """How many requests were ended."""

    aborted: int


class Status(Struct):
    """That the server answers, and how it is."""

    status: str


class Done(Struct):
    """That an order was carried out."""

    success: bool
    message: str


class RankLoad(Struct):
    """The load under SGLang's names."""

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int


class Loads(Struct):
    """The answer of GET /v1/loads."""

    running: int
    waiting: int
    free_tokens: int
    evictable_tokens: int
    total_tokens: int
    loads: list[RankLoad]


class ModelInfo(Struct):
    """The answer of GET /model_info."""

    model_path: str
    served_model_name: str
    is_generation: bool
    max_model_len: int
    vocab_size: int


class ServerInfo(Struct):
    """The answer of GET /server_info: every setting by its name beside these."""

    version: str
    served_model_name: str
    context_length: int
    internal_states: list[dict[str, Any]]


class TreeNode(Struct):
    """A node of the prefix tree. `end` counts the tokens from the root to its end; `requests` run, and `pins` stand, at it or
    below. `preview` where texts may be shown."""

    id: int
    parent: int
    num_tokens: int
    end: int
    num_pages: int
    requests: int
    is_pinned: bool
    pins: int
    hits: int
    age_s: float
    num_children: int
    is_salted: bool
    preview: str = ""


class CacheTree(Struct):
    """The answer of GET /cache/tree: behind the node that was asked for, unless it is the root, those below it. `is_cut`: the
    limit left out some."""

    node: int
    nodes: list[TreeNode]
    is_cut: bool
    num_nodes: int
    cached_tokens: int
    evictable_tokens: int
    free_tokens: int
    total_tokens: int
    prompt_tokens_seen: int
    prompt_tokens_hit: int
    hit_rate: float
    num_pins: int
    pinned_tokens: int
    max_pinned_tokens: int
    pins_given_up: int
    previews: bool
    previews_reason: str | None


class PinnedNodes(Struct):
    """The answer of GET /cache/pins."""

    nodes: list[TreeNode]
    num_pins: int
    pinned_tokens: int
    max_pinned_tokens: int
    pins_given_up: int
    previews: bool
    previews_reason: str | None


class PinState(Struct):
    """What became of a pin, and what all of them hold."""

    node: int
    is_pinned: bool
    num_pins: int
    pinned_tokens: int
    max_pinned_tokens: int
    pins_given_up: int


class Evicted(Struct):
    """The answer of POST /cache/evict."""

    node: int
    num_nodes: int
    freed_tokens: int


class MessageMatch(Struct):
    """Of a prompt the tokens from the first to the last of a message's own; null where they are not known."""

    index: int
    role: str
    start: int | None
    tokens: int | None
    matched: int | None


class PictureMatch(Struct):
    """Of a prompt the places of a picture, a video or a sound."""

    index: int
    message: int
    kind: str
    start: int
    tokens: int
    matched: int


class MatchReason(Struct):
    """Why the cache knows no more of a prompt. `token` stands at `position` of the prompt, `cached_token` there in the cache,
    where that is one and may be shown."""

    code: Literal["complete", "differs", "evicted", "new", "other_salt", "picture", "off"]
    message: str
    position: int
    in_message: int | None
    token: str
    cached_token: str | None


class LookedUp(Struct):
    """The answer of POST /cache/lookup. `path`: the nodes of the known part, from the top."""

    tokens: int
    matched: int
    path: list[int]
    per_message: list[MessageMatch] | None
    per_message_reason: str | None
    pictures: list[PictureMatch]
    reason: MatchReason


class FormProblem(Struct):
    """Why no answer could be held to a form: what a chat with it would be refused with."""

    message: str
    param: str | None
    code: str


class FormChecked(Struct):
    """The answer of POST /forms/check. `warnings`: what of it would have no effect."""

    valid: bool
    error: FormProblem | None
    warnings: list[str]


class LiveRequest(Struct):
    """A request that runs or waits. Ids are null where the asker may not see them."""

    id: str | None
    client_id: str | None
    state: Literal["running", "waiting"]
    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    generated_tokens: int
    age_s: float


class EngineSteps(Struct):
    """The answer of GET /engine/steps. Of a step there is one number for each of `columns`; `missed` steps are forgotten, or over
    the limit."""

    now_s: float
    columns: list[str]
    steps: list[list[float]]
    last: int
    missed: int
    load: dict[str, int]
    hit_rate: float
    num_requests: int
    requests: list[LiveRequest]
    shows_ids: bool


class PageSettings(Struct):
    """The answer of GET /playground/config.json."""

    version: str
    model: str
    aliases: list[str]
    context_len: int
    max_body_bytes: int
    max_logprobs: int
    resume_window_s: float
    sampling_defaults: dict[str, float]
    image_limits: dict[str, Any] | None
    takes: dict[str, bool]
    cache: dict[str, Any]
    allowed: dict[str, Any]


class CacheInfo(Struct):
    """The answer of GET /cache."""

    num_nodes: int
    cached_tokens: int
    evictable_tokens: int
    free_tokens: int
    total_tokens: int
    hit_rate: float
    top_prefixes: list[dict[str, Any]]
