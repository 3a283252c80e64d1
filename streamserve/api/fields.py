"""What becomes of every field that a chat or completion body may hold: supported, accepted with a warning, or refused.

Owns these decisions as data: api/schema.py refuses by them, answers carry their warnings, docs/api-fields.md is printed from
them. `python -m streamserve.api.fields > docs/api-fields.md` writes the page anew. Knows nothing of values' meaning.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Decision(StrEnum):
    """What happens to a field that is given."""

    SUPPORTED = "supported"
    WARNED = "accepted with a warning"
    REFUSED = "refused with 400"


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `note` ends the sentence that a client gets: why a field is refused, or why it has no effect. `harmless` are
    values that ask for nothing, so that they neither warn nor fail."""

    name: str
    decision: Decision
    note: str = ""
    harmless: tuple[Any, ...] = ()


def _supported(**notes: str) -> tuple[Field, ...]:
    return tuple(Field(name, Decision.SUPPORTED, note) for name, note in notes.items())


def _warned(name: str, note: str, *harmless: Any) -> Field:
    return Field(name, Decision.WARNED, note, harmless)


def _refused(name: str, note: str, *harmless: Any) -> Field:
    return Field(name, Decision.REFUSED, note, harmless)


_BOTH: tuple[Field, ...] = (
    *_supported(
        model="the served name or an alias; another name is a 404",
        max_tokens="chat: to the end of the context when left out; completions: 16",
        min_tokens="no end before so many tokens; a grammar that has nothing more to say ends all the same",
        temperature="0 to 100; 0 is greedy",
        top_p="above 0 to 1",
        top_k="0 and -1 are off",
        min_p="0 to 1",
        frequency_penalty="-2 to 2",
        presence_penalty="-2 to 2",
        repetition_penalty="above 0 to 2",
        logit_bias="token id to -100 … 100, at most 1024 entries",
        seed="the same seed gives the same text, alone or in company",
        n="1 to 128",
        stop="a string or up to 32; where thoughts and calls are parsed it holds for content only, not inside those",
        stop_regex="SGLang's: a pattern or up to 32 that end an answer as stop does, at the first character with which one is "
        "matched; matches have at most 256 characters, all patterns 2000, and ^, $ and look-around have no place",
        stop_token_ids="further tokens that end an answer",
        ignore_eos="go on past the end token",
        no_stop_trim="the stop string stays in the text",
        skip_special_tokens="false: control tokens show in the text",
        stream="server-sent events",
        resumable="the stream goes on for a while when its client leaves, and can be read on: api/resume.py",
        return_progress="comments in a stream, frames on a socket: how much of a long prompt is computed",
        stream_options="include_usage, continuous_usage_stats; include_obfuscation true is accepted with a warning",
        return_token_ids="token_ids and prompt_token_ids beside the text; token_id in a chat's logprobs",
        return_timings="timings beside the usage: milliseconds in the queue, for the prompt, for the answer (llama.cpp's names)",
        return_draft_marks="draft_marks beside the text: which parts of it were guessed, and which a grammar forced",
        prompt_logprobs="vLLM's: log-probabilities of the prompt's tokens, with so many alternatives",
        cache_salt="prompts of different salts share no cached prefix",
        rid="a name for /abort_request",
        request_id="a name for /abort_request",
        response_format="text, json_object, json_schema (strict or not), structural_tag",
        json_schema="SGLang's: a schema, as JSON or as a string of it",
        regex="SGLang's: the whole answer matches it",
        ebnf="SGLang's: a grammar, GBNF or Lark",
        choice="the answer is one of these strings",
        guided_choice="vLLM's name for choice",
        json_whitespace='"compact" (default) or "flexible": white space between the parts of constrained JSON',
        jump_forward="false: every token costs a step, even one that the grammar leaves no choice about",
        priority="waiting requests of higher priority run first, where --schedule-policy says so",
        timeout="seconds the request may take",
    ),
    _warned("user", "requests are not told apart by user"),
    _refused("guided_json", "its name here is json_schema"),
    _refused("guided_regex", "its name here is regex"),
    _refused("guided_grammar", "its name here is ebnf"),
    _refused("structured_outputs", "its parts have names of their own here: json_schema, regex, ebnf, choice"),
    _refused("lora_path", "adapters are not loaded here"),
    _refused("session_id", "the prefix cache finds conversations by itself"),
    _refused("session_params", "the prefix cache finds conversations by itself"),
    _refused("extra_key", "its name here is cache_salt"),
    _refused("custom_logit_processor", "the server runs no code of its clients"),
    _refused("custom_params", "the server runs no code of its clients"),
    _refused("return_hidden_states", "hidden states do not leave the engine", False),
    _refused("bad_words", "use logit_bias"),
)

CHAT: tuple[Field, ...] = (
    *_supported(
        messages="system, developer, user, assistant, tool, function; text and refusal parts; image_url, input_image, "
        "video_url, input_audio and audio_url parts of users and tools, where the model takes such (docs/pictures.md); "
        "reasoning_content (or reasoning) and refusal of assistants; their audio is refused; what nothing reads is named in a "
        "warning",
        max_completion_tokens="OpenAI's newer name for max_tokens; both, when they differ, are refused",
        logprobs="log-probabilities of the content's tokens",
        top_logprobs="0 to 20",
        tools="functions; strict ones are held to their schema even where nobody forces a call",
        tool_choice="auto, none (the model does not see the tools), required, a named function, allowed_tools",
        parallel_tool_calls="false: at most one call",
        functions="OpenAI's older form of tools; answers come in its form too",
        function_call="OpenAI's older form of tool_choice",
        reasoning_effort="handed to the chat template; none also turns thinking off",
        separate_reasoning="false: thoughts stay in the content, as the model wrote them",
        stream_reasoning="false: a thought comes as one delta when it is over",
        max_thinking_tokens="the thought is ended after so many tokens",
        thinking_budget="another name for max_thinking_tokens",
        add_generation_prompt="false: the prompt ends with the last message",
        continue_final_message="the answer goes on from the last message, an assistant's",
        chat_template_kwargs="variables of the chat template, as enable_thinking",
        allow_control_tokens="true: the text of control tokens in messages becomes those tokens, instead of plain text",
        verbosity="handed to the chat template",
        prediction="what much of the answer will be, a text or text parts: the answer stays the same, and comes faster where "
        "this is right",
    ),
    _warned("metadata", "chat completions are not stored"),
    _warned("store", "chat completions are not stored; /v1/responses stores", False),
    _warned("service_tier", "there is one tier", "auto", "default"),
    _warned("prompt_cache_key", "the prefix cache finds shared prompts by itself"),
    _warned("prompt_cache_retention", "the prefix cache keeps what fits"),
    _warned("prompt_cache_options", "the prefix cache finds shared prompts by itself"),
    _warned("safety_identifier", "requests are not told apart by user"),
    _refused("modalities", "answers are text", ["text"]),
    _refused("audio", "answers are text"),
    _refused("web_search_options", "the server does not search; give a tool that does"),
    _refused("moderation", "there is no moderation model here, and an answer must not look as if one had seen it"),
    _refused("chat_template", "a template is a program; set the server's with --chat-template"),
    _refused("input_ids", "use /v1/completions for token ids"),
)

COMPLETION: tuple[Field, ...] = (
    *_supported(
        prompt="a text, token ids, or a list of either",
        echo="the prompt in front of the answer; with logprobs the prompt's too",
        logprobs="0 to 20 alternatives",
        best_of="so many are generated, and the n with the best mean log-probability come back; not with stream",
    ),
    _warned("metadata", "completions are not stored"),
    _warned("store", "completions are not stored; /v1/responses stores", False),
    _warned("service_tier", "there is one tier", "auto", "default"),
    _warned("prompt_cache_key", "the prefix cache finds shared prompts by itself"),
    _warned("safety_identifier", "requests are not told apart by user"),
    _refused("suffix", "the model is not asked to fill in the middle", ""),
)

# Of _BOTH's fields the responses API takes these as they are.
_SHARED = frozenset(
    (
        *("model", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("logit_bias", "seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "no_stop_trim", "skip_special_tokens"),
        *("regex", "ebnf", "choice", "json_whitespace", "jump_forward", "cache_salt", "rid", "request_id", "priority", "timeout"),
        *("stream", "user", "return_progress"),
    )
)
RESPONSES: tuple[Field, ...] = (
    *_supported(
        input="a text, or items: message, function_call, function_call_output, reasoning, item_reference; input_image parts of "
        "users' messages and of outputs, where the model takes pictures",
        instructions="the system message; not carried over by previous_response_id",
        previous_response_id="the conversation up to that response comes before the input",
        store="true (default): kept under its id, in memory or in --response-store",
        background="true: goes on without its client; GET and cancel it by its id",
        stream_options="include_obfuscation",
        resumable="true: the stream survives its connection",
        max_output_tokens="to the end of the context when left out; reasoning counts",
        include="message.output_text.logprobs; the others concern what is not served and are accepted with a warning",
        top_logprobs="0 to 20; turns log-probabilities on",
        text="format: text, json_object, json_schema; verbosity is handed to the chat template",
        reasoning="effort is handed to the chat template, none turns thinking off; summary and context: a warning",
        max_thinking_tokens="the thought is ended after so many tokens",
        tools="functions; strict ones are held to their schema",
        tool_choice="auto, none, required, a named function, allowed_tools",
        parallel_tool_calls="false: at most one call",
        truncation="auto: the oldest turns are left out until the rest fits",
        metadata="at most 16 entries, kept with the response",
        chat_template_kwargs="variables of the chat template",
        allow_control_tokens="true: the text of control tokens in messages becomes those tokens, instead of plain text",
    ),
    *(field for field in _BOTH if field.name in _SHARED),
    _warned("max_tool_calls", "it limits tools that the server runs, and there are none"),
    _warned("service_tier", "there is one tier", "auto", "default"),
    _warned("prompt_cache_key", "the prefix cache finds shared prompts by itself"),
    _warned("prompt_cache_retention", "the prefix cache keeps what fits"),
    _warned("prompt_cache_options", "the prefix cache finds shared prompts by itself"),
    _warned("safety_identifier", "requests are not told apart by user"),
    _refused("conversation", "conversations are not kept as objects; chain responses with previous_response_id"),
    _refused("prompt", "prompt templates are not kept here; send input and instructions"),
    _refused("context_management", "nothing is compacted; truncation auto leaves out the oldest turns"),
    _refused("moderation", "there is no moderation model here, and an answer must not look as if one had seen it"),
    _refused("messages", "its name here is input"),
    _refused("max_tokens", "its name here is max_output_tokens"),
    _refused("max_completion_tokens", "its name here is max_output_tokens"),
    _refused("response_format", "its name here is text.format"),
    _refused("reasoning_effort", "its name here is reasoning.effort"),
    _refused("verbosity", "its name here is text.verbosity"),
    _refused("logprobs", 'ask for them with include: ["message.output_text.logprobs"]', False),
    _refused("n", "a response is one answer", 1),
)

MESSAGES: tuple[Field, ...] = (
    *_supported(
        model="the served name or an alias; another name is a 404",
        messages="blocks text, image (where the model takes pictures: base64, url or file), tool_use, tool_result, thinking, "
        "redacted_thinking (nothing here can read it: a warning), search_result, tool_reference; document is refused. Role "
        "system too; a last message of role assistant is continued",
        max_tokens="where the context ends earlier, stop_reason is model_context_window_exceeded; 0 only fills the cache",
        system="a text or text blocks; Claude Code's line x-anthropic-billing-header is left out: it would spoil every cached "
        "prefix",
        stop_sequences="up to 32; they hold for text only, not inside thoughts and calls",
        stream="server-sent events",
        temperature="0 to 1",
        top_p="above 0 to 1",
        top_k="0 and -1 are off",
        thinking="enabled (budget_tokens below max_tokens), adaptive, disabled; without it the model is asked not to think, "
        "where its template can do that; a model that is not known to reason answers with a warning. display omitted: the "
        "thought travels in the signature",
        tools="of type custom, defer_loading included; those that Anthropic runs or defines are refused",
        tool_choice="auto, any, tool, none; disable_parallel_tool_use",
        output_config="format json_schema; effort low, medium, and high for the levels above",
        output_format="the older name of output_config.format",
        context_management="clear_thinking_20251015; other edits are refused",
        cache_control="here and on blocks: every prompt is cached, whatever it says",
        speed="standard; fast is refused",
        seed="not Anthropic's: the same seed gives the same text",
        priority="not Anthropic's: see chat",
        timeout="not Anthropic's: seconds the request may take",
        resumable="not Anthropic's: the stream survives its connection",
    ),
    _warned("metadata", "requests are not told apart by user"),
    _warned("service_tier", "there is one tier", "auto"),
    _refused("container", "no code is run here"),
    _refused("mcp_servers", "no servers are called from here; offer their tools as custom ones", []),
    _refused("inference_geo", "requests are served where the server stands"),
    _refused("diagnostics", "usage says what the cache held; GET /cache shows more"),
    _refused("compaction", "nothing is compacted here"),
    _refused("thread", "conversations are not kept; send all of their messages"),
    _refused("fallbacks", "one model is served"),
    _refused("fallback_credit_token", "there are no accounts"),
    _refused("billing_policy", "there are no accounts"),
)

# What all routes of the embedding model share.
ENCODED: tuple[Field, ...] = (
    *_supported(
        model="the embedding model's name; without it there is only one that can be meant",
        truncate="true: what is too long is cut to what the model takes",
        truncate_prompt_tokens="what is longer is cut to so many tokens; -1: to what the model takes",
        timeout="seconds the request may take",
    ),
    _warned("user", "requests are not told apart by user"),
)
EMBEDDINGS: tuple[Field, ...] = (
    *_supported(
        input="a text, up to 2048 texts, token ids, or lists of them; an empty one is refused",
        encoding_format="float or base64",
        dimensions="the first numbers of each vector, with length 1 again; for every model",
        prompt_name="which of the model's own prompts stands before each text",
    ),
    *ENCODED,
)
ENCODE: tuple[Field, ...] = (
    *_supported(
        text="a text or texts",
        input_ids="token ids or lists of them, in the place of text",
        dimensions="as for /v1/embeddings",
        rid="a name, or one for each text; answers carry it",
    ),
    *ENCODED,
)
RERANK: tuple[Field, ...] = (
    *_supported(
        query="a text",
        documents="up to 2048 texts, or objects with text",
        top_n="only so many of the best",
        return_documents="true unless given",
        results_only="true: a bare list, as SGLang answers",
    ),
    *ENCODED,
)
SCORE: tuple[Field, ...] = (
    *_supported(
        text_1="a text or texts",
        text_2="texts to compare with the one, or each with its own",
        query="a text or token ids, for the LLM",
        items="what stands behind the query, one or many, of the query's kind",
        label_token_ids="up to 256 tokens, of which the probability behind query and item is wanted",
        apply_softmax="true: probabilities among the labels only",
        item_first="true: the item stands before the query",
    ),
    *ENCODED,
)
CLASSIFY: tuple[Field, ...] = (*_supported(input="a text or up to 2048"), *ENCODED)

# Every route's table, for the page. Other dialects add theirs.
TABLES: Mapping[str, tuple[Field, ...]] = {
    "POST /v1/chat/completions": (*CHAT, *_BOTH),
    "POST /v1/completions": (*COMPLETION, *_BOTH),
    "POST /v1/responses": RESPONSES,
    "POST /v1/messages": MESSAGES,
    "POST /v1/embeddings": EMBEDDINGS,
    "POST /encode": ENCODE,
    "POST /v1/rerank": RERANK,
    "POST /v1/score": SCORE,
    "POST /v1/classify": CLASSIFY,
}
# What clients of others have methods for and no route answers. {id}: anything.
_NOT_STORED = "chat completions are not stored; /v1/responses stores"
_NO_BATCHES = "there are none of Anthropic's batches; /v1/batches takes lines for /v1/messages, or send the messages at once"
UNSERVED: Mapping[str, str] = {
    "GET /v1/chat/completions": _NOT_STORED,
    "GET /v1/chat/completions/{id}": _NOT_STORED,
    "POST /v1/chat/completions/{id}": _NOT_STORED,
    "DELETE /v1/chat/completions/{id}": _NOT_STORED,
    "GET /v1/chat/completions/{id}/messages": _NOT_STORED,
    "POST /v1/responses/compact": "nothing is compacted; truncation auto leaves out the oldest turns",
    "DELETE /v1/models/{id}": "the model is the server's own",
    "POST /v1/messages/batches": _NO_BATCHES,
    "GET /v1/messages/batches": _NO_BATCHES,
    "GET /v1/messages/batches/{id}": _NO_BATCHES,
    "POST /v1/messages/batches/{id}": _NO_BATCHES,
    "DELETE /v1/messages/batches/{id}": _NO_BATCHES,
}
_UNSERVED = tuple((re.compile(re.escape(route).replace(r"\{id\}", ".+")), note) for route, note in UNSERVED.items())
REFUSED: Mapping[str, Field] = {field.name: field for field in (*CHAT, *COMPLETION, *_BOTH) if field.decision is Decision.REFUSED}


WARNED_CHAT, WARNED_COMPLETION = (
    tuple([field for field in (*fields, *_BOTH) if field.decision is Decision.WARNED]) for fields in (CHAT, COMPLETION)
)


def warnings_of(warned: Iterable[Field], request: object) -> tuple[str, ...]:
    """A sentence for each of these fields that a body gives. Fields left out, and harmless values, say nothing."""
    return tuple(
        [
            f"{field.name} has no effect: {field.note}"
            for field in warned
            if getattr(request, field.name) not in (None, *field.harmless)
        ]
    )


def why_unserved(method: str, path: str) -> str | None:
    """Why there is no such route, where that is known."""
    return next((note for pattern, note in _UNSERVED if pattern.fullmatch(f"{method} {path}")), None)


def page() -> str:
    """docs/api-fields.md"""
    lines = [
        "# Fields of requests",
        "",
        "What becomes of every field, printed from `streamserve/api/fields.py`. Nothing is ignored in silence: a field that has",
        "no effect is named in the header `x-streamserve-warning` of the answer; one that cannot be served, or that nobody",
        "knows, is a 400 that says why. `null` means the same as leaving a field out.",
    ]
    for route, fields in TABLES.items():
        lines += ["", f"## {route}", "", "| Field | | |", "|---|---|---|"]
        lines += [f"| `{field.name}` | {field.decision} | {field.note} |" for field in fields]
    lines += ["", "## Methods of clients that are not served", "", "| | |", "|---|---|"]
    lines += [f"| `{route}` | {note} |" for route, note in UNSERVED.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
