"""Every field of the Messages API, and every method, through the real anthropic client, on a model that samples: see
test_openai_fields.py."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.resources.messages import AsyncMessages
from anthropic.types import Message
from pydantic import BaseModel

from streamserve.api.fields import MESSAGES, UNSERVED, Decision, Field
from tests.e2e.random_model import RandomServer
from tests.e2e.test_openai_fields import LEN, await_in_order, server
from tests.e2e.test_openai_methods import methods_of

pytestmark = pytest.mark.anyio
__all__ = ["server"]
HI: Any = [{"role": "user", "content": "Hello"}]
SET_FLAG: Any = {
    "name": "set_flag",
    "description": "Sets a flag.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}
# The client's own arguments; the last two become headers.
OWN = frozenset(("self", "extra_headers", "extra_query", "extra_body", "timeout", "user_profile_id", "workspace_id"))
TYPED = frozenset(inspect.signature(AsyncMessages.create).parameters) - OWN


class Flag(BaseModel):
    is_set: bool


@pytest.fixture(scope="module")
async def client(server: RandomServer) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as anthropic_client:
        yield anthropic_client


@dataclass(frozen=True)
class Asker:
    """Sends messages: typed arguments where the client has them, else its extra_body."""

    server: RandomServer
    client: AsyncAnthropic

    @property
    def prompt(self) -> str:
        ids = self.server.engine.requests[-1].token_ids
        return self.server.text.tokenizer.decode(ids, skip_special_tokens=False)

    def arguments(self, **fields: Any) -> dict[str, Any]:
        given = {"model": "tiny", "messages": HI, "max_tokens": LEN, **fields}
        typed = {name: value for name, value in given.items() if name in TYPED}
        return {**typed, "extra_body": {name: value for name, value in given.items() if name not in TYPED}}

    async def raw(self, **fields: Any) -> tuple[Message, str]:
        """The message, and the warnings."""
        answer = await self.client.messages.with_raw_response.create(**self.arguments(**fields))
        message: Any = await answer.parse()  # type: ignore[misc]
        return message, answer.headers.get("x-streamserve-warning", "")

    async def __call__(self, **fields: Any) -> Message:
        return (await self.raw(**fields))[0]

    async def both(self, **fields: Any) -> Message:
        """The message, after making sure that its stream is the same."""
        whole = await self(**fields)
        async with self.client.messages.stream(**self.arguments(**fields)) as stream:
            streamed = await stream.get_final_message()
        assert (text_of(streamed), streamed.stop_reason) == (text_of(whole), whole.stop_reason)
        return whole

    async def refusal(self, **fields: Any) -> anthropic.APIStatusError:
        with pytest.raises(anthropic.APIStatusError) as refused:
            await self(**fields)
        return refused.value


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def thought_of(message: Message) -> str:
    return "".join(block.thinking for block in message.content if block.type == "thinking")


Check = Callable[[Asker], Awaitable[None]]
CASES: dict[str, Check] = {}


def shows(check: Check) -> Check:
    """The check shows the effect of the field that it is named after."""
    CASES[check.__name__] = check
    return check


@shows
async def model(ask: Asker) -> None:
    assert (await ask(model="small")).model in ("tiny", "small")
    assert isinstance(await ask.refusal(model="claude-9"), anthropic.NotFoundError)


@shows
async def messages(ask: Asker) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "set_flag", "input": {"on": True}}
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Set it."}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "I will.", "signature": ""}, call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "it is set"}]},
        {"role": "assistant", "content": "I have"},
    ]
    await ask(messages=turns, tools=[SET_FLAG])
    for text in ("user\nSet it.", "I will.", '"set_flag"', "it is set"):
        assert text in ask.prompt, text
    assert ask.prompt.endswith("assistant\nI have")
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert "takes no pictures" in str(await ask.refusal(messages=[{"role": "user", "content": [image]}]))


@shows
async def max_tokens(ask: Asker) -> None:
    answer = await ask.both(max_tokens=5, seed=1)
    assert (len(text_of(answer)), answer.usage.output_tokens, answer.stop_reason) == (5, 5, "max_tokens")


@shows
async def system(ask: Asker) -> None:
    for given in ("Be kind.", [{"type": "text", "text": "Be kind."}]):
        await ask(system=given)
        assert "system\nBe kind.<|im_end|>" in ask.prompt


@shows
async def stop_sequences(ask: Asker) -> None:
    plain = text_of(await ask(temperature=0))
    end = plain[5:7]
    answer = await ask.both(temperature=0, stop_sequences=["§", end])
    assert text_of(answer) == plain[: plain.index(end)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", end)


@shows
async def stream(ask: Asker) -> None:
    whole = await ask(seed=1)
    events = [event async for event in await ask.client.messages.create(**ask.arguments(seed=1, stream=True))]  # type: ignore[misc]
    texts = [event.delta.text for event in events if event.type == "content_block_delta" and event.delta.type == "text_delta"]
    assert len(texts) > 3 and "".join(texts) == text_of(whole)


async def texts_of(ask: Asker, **fields: Any) -> set[str]:
    return {text_of(await ask(seed=seed, **fields)) for seed in range(3)}


@shows
async def temperature(ask: Asker) -> None:
    assert (len(await texts_of(ask, temperature=0)), len(await texts_of(ask, temperature=1))) == (1, 3)


@shows
async def top_p(ask: Asker) -> None:
    assert await texts_of(ask, top_p=1e-6) == {text_of(await ask(temperature=0))}


@shows
async def top_k(ask: Asker) -> None:
    assert await texts_of(ask, top_k=1) == {text_of(await ask(temperature=0))}


@shows
async def seed(ask: Asker) -> None:
    assert text_of(await ask(seed=5)) == text_of(await ask(seed=5)) != text_of(await ask(seed=6))


@shows
async def thinking(ask: Asker) -> None:
    answer = await ask.both(thinking={"type": "enabled", "budget_tokens": 10}, max_tokens=40, seed=1)
    assert 0 < len(thought_of(answer)) <= 10 and text_of(answer)
    for off in ({"type": "disabled"}, None):
        assert thought_of(await ask(thinking=off)) == "" and ask.prompt.endswith("</think>\n\n")


@shows
async def tools(ask: Asker) -> None:
    await ask(tools=[SET_FLAG])
    assert "set_flag" in ask.prompt and "Sets a flag." in ask.prompt
    assert isinstance(await ask.refusal(tools=[{"type": "bash_20250124", "name": "bash"}]), anthropic.BadRequestError)


@shows
async def tool_choice(ask: Asker) -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "set_flag"}):
        answer = await ask(tools=[SET_FLAG], tool_choice=choice, max_tokens=400)
        (call,) = answer.content
        assert call.type == "tool_use" and answer.stop_reason == "tool_use"
        assert call.name == "set_flag" and isinstance(call.input["on"], bool)
    await ask(tools=[SET_FLAG], tool_choice={"type": "none"})
    assert "set_flag" not in ask.prompt
    await ask(tools=[SET_FLAG], tool_choice={"type": "auto"})
    assert "set_flag" in ask.prompt


FORM = {"type": "json_schema", "schema": {"enum": [10, 20]}}


@shows
async def output_config(ask: Asker) -> None:
    assert text_of(await ask.both(output_config={"format": FORM}, seed=1)) in ("10", "20")
    await ask(output_config={"effort": "low"})
    assert ask.prompt.startswith("effort=low\n")


@shows
async def output_format(ask: Asker) -> None:
    assert text_of(await ask(output_format=FORM, seed=1)) in ("10", "20")


@shows
async def context_management(ask: Asker) -> None:
    answer = await ask(context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]})
    assert answer.to_dict()["context_management"] == {"applied_edits": []}
    refused = await ask.refusal(context_management={"edits": [{"type": "clear_tool_uses_20250919"}]})
    assert "context_management" in str(refused)


@shows
async def cache_control(ask: Asker) -> None:
    long: Any = [{"role": "user", "content": "A long beginning of a conversation. " * 4}]
    await ask(messages=long, cache_control={"type": "ephemeral"})
    again = await ask(messages=long, cache_control={"type": "ephemeral"})
    assert (again.usage.cache_read_input_tokens or 0) > 100


@shows
async def speed(ask: Asker) -> None:
    assert (await ask.raw(speed="standard"))[1] == ""
    assert "speed" in str(await ask.refusal(speed="fast"))


@shows
async def priority(ask: Asker) -> None:
    await await_in_order(ask.server, lambda level: ask(priority=level, max_tokens=2))


@shows
async def timeout(ask: Asker) -> None:
    assert (await ask.refusal(timeout=0.02, max_tokens=3000)).status_code == 504


@shows
async def resumable(ask: Asker) -> None:
    for wanted in (True, False):
        arguments = ask.arguments(stream=True, resumable=wanted)
        async with ask.client.messages.with_streaming_response.create(**arguments) as response:
            lines = [line async for line in response.iter_lines()]
        assert any(line.startswith("id: ") for line in lines) is wanted


VALUES: dict[str, Any] = {
    "metadata": {"user_id": "me"},
    "service_tier": "standard_only",
    "mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}],
    "diagnostics": {"previous_message_id": None},
    "fallbacks": [{"model": "x"}],
}


async def check_field(ask: Asker, field: Field) -> None:
    value = VALUES.get(field.name, "x")
    if field.decision is Decision.SUPPORTED:
        await CASES[field.name](ask)
    elif field.decision is Decision.WARNED:
        assert (await ask.raw(**{field.name: value}))[1] == f"{field.name} has no effect: {field.note}"
    else:
        refused = await ask.refusal(**{field.name: value})
        assert isinstance(refused, anthropic.BadRequestError) and field.name in str(refused) and field.note in str(refused.body)


def test_every_field_has_a_case_and_every_argument_of_the_client_is_in_the_table() -> None:
    assert set(CASES) == {field.name for field in MESSAGES if field.decision is Decision.SUPPORTED}
    assert len(TYPED) > 10 and not TYPED - {field.name for field in MESSAGES}


@pytest.mark.parametrize("field", [pytest.param(field, id=field.name) for field in MESSAGES])
async def test_a_field_does_what_the_table_says(server: RandomServer, client: AsyncAnthropic, field: Field) -> None:
    await check_field(Asker(server, client), field)


async def test_every_method_works_or_says_why_not(server: RandomServer, client: AsyncAnthropic) -> None:
    refused = {
        "messages.batches.create": {"requests": []},
        "messages.batches.list": {},
        **{f"messages.batches.{name}": {"message_batch_id": "x"} for name in ("retrieve", "cancel", "delete", "results")},
    }
    found = dict(method for root in ("messages", "models") for method in methods_of(getattr(client, root), root))
    served = {"messages.create", "messages.stream", "messages.parse", "messages.count_tokens", "models.list", "models.retrieve"}
    assert set(found) == served | set(refused)
    for name, arguments in refused.items():
        with pytest.raises(anthropic.APIStatusError) as error:
            answer = found[name](**arguments)
            [entry async for entry in answer] if name.endswith("list") else await answer
        assert error.value.status_code in (404, 405)
        assert UNSERVED["POST /v1/messages/batches"] in str(error.value.body)
    parsed = await client.messages.parse(model="tiny", max_tokens=50, messages=HI, output_format=Flag)
    assert isinstance(parsed.parsed_output, Flag)
    counted = await client.messages.count_tokens(model="tiny", messages=HI, tools=[SET_FLAG], system="Be kind.")
    made = await client.messages.create(model="tiny", max_tokens=4, messages=HI, tools=[SET_FLAG], system="Be kind.")
    assert counted.input_tokens == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
    assert [card.id async for card in client.models.list()] == ["tiny", "small", "vectors"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
