"""Whether what is said of guesses adds up: usages of many requests against what /metrics counts.

    python bench/speculative.py counters [--count 1000] [--at-once 32] [--seed 0] [-- FLAGS]

A server with made-up tokens and --speculative ngram answers random requests: streamed, whole and over one WebSocket, one choice
or several, chats and completions, free and under a JSON schema. Prompts hold parts of what the answers will say, so that guesses
are right for a while. A third is cancelled somewhere in the answer, by /abort or a frame, and pages run out at times. Then

    tokens on the wire (return_token_ids)  =  completion_tokens of every usage, and their sum = generation_tokens_total
    accepted + rejected of every usage, summed  =  drafted_tokens_total; accepted alone = accepted_tokens_total

hold exactly. What a grammar forces at the very beginning waits for the first token, so a little of jumped_tokens_total may belong
to answers that were cancelled before anything was sent.

The clients of a tenth as many requests again hang up, or their answers end at a stop string: there the server may have computed
what nobody was sent. What /metrics counts of them is no less than what came, and no more than was asked for. In the end nothing
runs any more, and every page is in the tree or free.

Owns the requests and the sums. Knows the server from outside only.
"""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from bench.load import MARK
from bench.server import FAKE, Server
from streamserve.build import FAKE_ANSWER

if TYPE_CHECKING:
    import httpx

# So few KV tokens that requests are preempted now and then.
FLAGS = ("--speculative", "ngram", "--fake-step-ms", "1", "--max-total-tokens", "8k", "--log-level", "warning")
WIRES = ("stream", "whole", "socket")
DRAFTED, ACCEPTED = "streamserve_drafted_tokens_total", "streamserve_accepted_tokens_total"
GENERATED, JUMPED = "streamserve_generation_tokens_total", "streamserve_jumped_tokens_total"
PREEMPTED = "streamserve_num_preemptions_total"
SCHEMA = {
    "type": "object",
    "properties": {"answer_in_words": {"type": "string", "maxLength": 200}, "is_certain": {"type": "boolean"}},
    "required": ["answer_in_words", "is_certain"],
    "additionalProperties": False,
}
LIMIT_S = 120.0
MOST_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Plan:
    """One request. After `cancels_after` events (of a whole answer: milliseconds) it is cancelled; None: it is not.
    `hangs_up`: its client leaves instead."""

    id: str
    wire: str
    is_chat: bool
    body: dict[str, Any]
    cancels_after: int | None = None
    hangs_up: bool = False

    @property
    def most_tokens(self) -> int:
        """What was asked for."""
        return int(self.body["max_tokens"]) * int(self.body["n"])

    @property
    def path(self) -> str:
        """Its route."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"


@dataclass(slots=True)
class Sent:
    """What came of a request."""

    num_tokens: int = 0
    usage: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)
    error: str | None = None

    def take(self, answer: Mapping[str, Any]) -> None:
        """A chunk, or a whole answer."""
        for choice in answer.get("choices", ()):
            self.num_tokens += len(choice.get("token_ids") or ())
            if choice.get("finish_reason"):
                self.reasons.append(choice["finish_reason"])
        self.usage = answer.get("usage") or self.usage

    @property
    def num_accepted(self) -> int:
        """Guesses that stand in the answer, by its usage."""
        return 0 if self.usage is None else int(self.usage["completion_tokens_details"]["accepted_prediction_tokens"])

    @property
    def num_drafted(self) -> int:
        """Guesses that were computed, by its usage."""
        if self.usage is None:
            return 0
        return self.num_accepted + int(self.usage["completion_tokens_details"]["rejected_prediction_tokens"])


def plans(count: int, rng: Random, *, are_exact: bool) -> list[Plan]:
    """Random requests. `are_exact`: none after which the server has computed what nobody was sent."""
    made = []
    for number in range(count):
        wire, is_chat = rng.choice(WIRES), rng.random() < 0.5
        question = " ".join(_piece(rng) for _ in range(rng.randint(1, 4)))
        body: dict[str, Any] = {
            "max_tokens": rng.randint(1, MOST_TOKENS),
            "n": rng.choice((1, 1, 1, 2, 3)),
            "temperature": rng.choice((0.0, 0.7)),
            "seed": rng.randrange(1 << 20),
            "rid": f"{'exact' if are_exact else 'loose'}{number}.",  # ends so that no id is the beginning of another
            "return_token_ids": True,
        }
        body |= {"messages": [{"role": "user", "content": question}]} if is_chat else {"prompt": question}
        if rng.random() < 0.15:
            body["json_schema"] = SCHEMA
        if wire == "stream":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        cancels_after, hangs_up = None, False
        if are_exact:
            cancels_after = rng.randint(1, 60) if rng.random() < 1 / 3 else None
        elif wire == "socket" or rng.random() < 0.3:
            body["stop"] = _piece(rng)[:5]
        else:
            cancels_after, hangs_up = rng.randint(1, 60), True
        made.append(Plan(body["rid"], wire, is_chat, body, cancels_after, hangs_up))
    return made


def _piece(rng: Random) -> str:
    """A part of what the server's answers are made of."""
    start = rng.randrange(len(FAKE_ANSWER) - 10)
    return FAKE_ANSWER[start : start + rng.randint(10, 120)].strip() or "text"


# ---- clients ---------------------------------------------------------------------------------------------------------------


class Clients:
    """Sends requests to one server, some at a time."""

    def __init__(self, port: int, at_once: int) -> None:
        self._port = port
        self._turns = asyncio.Semaphore(at_once)
        self._sockets: dict[str, asyncio.Queue[dict[str, Any]]] = {}

    async def run(self, made: Sequence[Plan]) -> list[Sent]:
        """All of them; what came of each."""
        import httpx
        from websockets.asyncio.client import connect

        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=LIMIT_S, limits=limits) as http,
            connect(f"ws://127.0.0.1:{self._port}/v1/ws", max_size=None) as socket,
        ):
            reader = asyncio.create_task(self._read(socket))
            try:
                return list(await asyncio.gather(*(self._one(plan, http, socket) for plan in made)))
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _one(self, plan: Plan, http: "httpx.AsyncClient", socket: Any) -> Sent:
        sent = Sent()
        ways = {"stream": self._stream, "whole": self._whole, "socket": self._speak}
        async with self._turns:
            try:
                await asyncio.wait_for(ways[plan.wire](plan, sent, socket if plan.wire == "socket" else http), LIMIT_S)
            except Exception as error:
                sent.error = f"{type(error).__name__}: {error}"
        return sent

    async def _stream(self, plan: Plan, sent: Sent, http: "httpx.AsyncClient") -> None:
        num_events = 0
        async with http.stream("POST", plan.path, json=plan.body) as answer:
            if answer.status_code != 200:
                raise ValueError((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if not line.startswith(MARK.decode()) or line.endswith("[DONE]"):
                    continue
                event = json.loads(line[len(MARK) :])
                if "error" in event:
                    raise ValueError(json.dumps(event))
                sent.take(event)
                num_events += 1
                if num_events == plan.cancels_after:
                    if plan.hangs_up:
                        return
                    await _abort(plan, http)

    async def _whole(self, plan: Plan, sent: Sent, http: "httpx.AsyncClient") -> None:
        async def ask() -> None:
            answer = await http.post(plan.path, json=plan.body)
            if answer.status_code != 200:
                raise ValueError(answer.text)
            sent.take(answer.json())

        asking = asyncio.create_task(ask())
        if plan.cancels_after is not None:
            await asyncio.wait({asking}, timeout=plan.cancels_after / 1e3)
            if plan.hangs_up:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                return
            await _abort(plan, http)
        await asking

    async def _speak(self, plan: Plan, sent: Sent, socket: Any) -> None:
        frames = self._sockets[plan.id] = asyncio.Queue()
        kind = "chat.create" if plan.is_chat else "completion.create"
        await socket.send(json.dumps({"type": kind, "id": plan.id, "request": plan.body}))
        num_events, is_cancelled = 0, False
        while True:
            if num_events == plan.cancels_after and not is_cancelled:
                is_cancelled = True
                await socket.send(json.dumps({"type": "cancel", "id": plan.id}))
            frame = await frames.get()
            if frame["type"] == "chunk":
                num_events += 1
                sent.take(frame["chunk"])
            elif frame["type"] == "done":
                sent.usage = frame["usage"]
                del self._sockets[plan.id]
                return
            elif frame["type"] == "error" and frame["error"]["code"] != "unknown_id":  # else the cancel came too late
                raise ValueError(json.dumps(frame))

    async def _read(self, socket: Any) -> None:
        """Frames to the requests they belong to. What comes late belongs to nobody."""
        async for text in socket:
            frame = json.loads(text)
            if frame.get("id") in self._sockets:
                self._sockets[frame["id"]].put_nowait(frame)


async def _abort(plan: Plan, http: "httpx.AsyncClient") -> None:
    await http.post("/abort", json={"rid": plan.body["rid"]})


# ---- sums ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens generated, guesses computed, guesses that were right, tokens that a grammar forced."""

    generated: int
    drafted: int
    accepted: int
    jumped: int

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(
            self.generated - other.generated,
            self.drafted - other.drafted,
            self.accepted - other.accepted,
            self.jumped - other.jumped,
        )


def counted(server: Server) -> Counts:
    """What /metrics says, as soon as nothing runs."""
    if not server.wait_idle():
        raise SystemExit("requests are still running a minute after the last client has gone")
    values = server.metrics()
    return Counts(int(values[GENERATED]), int(values[DRAFTED]), int(values[ACCEPTED]), int(values[JUMPED]))


def said(answers: Sequence[Sent]) -> Counts:
    """What usages say."""
    usages = [one.usage for one in answers if one.usage is not None]
    return Counts(
        sum(usage["completion_tokens"] for usage in usages),
        sum(one.num_drafted for one in answers),
        sum(one.num_accepted for one in answers),
        sum(usage["completion_tokens_details"]["jumped_tokens"] for usage in usages),
    )


def exact_checks(made: Sequence[Plan], answers: Sequence[Sent], metrics: Counts) -> dict[str, bool]:
    """What must hold of requests whose every token was sent."""
    errors = [one.error for one in answers if one.error is not None]
    without = sum(one.usage is None for one in answers)
    torn = [
        plan.id
        for plan, one in zip(made, answers, strict=True)
        if one.usage is not None
        and (
            one.num_tokens != one.usage["completion_tokens"]
            or not 0 <= one.num_accepted <= one.num_drafted
            or one.num_accepted > one.num_tokens
        )
    ]
    usages = said(answers)
    return {
        f"no request failed ({len(errors)} did: {errors[:1]})": not errors,
        f"every answer says its usage ({without} do not)": without == 0,
        f"tokens sent = completion_tokens, and no more of them accepted ({len(torn)} torn: {torn[:3]})": not torn,
        f"usages {usages} = /metrics {metrics}, but for jumped": replace(usages, jumped=metrics.jumped) == metrics,
        f"jumped: {usages.jumped} <= {metrics.jumped}": usages.jumped <= metrics.jumped,
        "there were right guesses and wrong ones": 0 < usages.accepted < usages.drafted,
    }


def loose_checks(made: Sequence[Plan], answers: Sequence[Sent], metrics: Counts) -> dict[str, bool]:
    """What must hold of requests whose clients were not sent everything."""
    errors = [one.error for one in answers if one.error is not None]
    usages, came = said(answers), sum(one.num_tokens for one in answers)
    most = sum(plan.most_tokens for plan in made)
    return {
        f"no request failed otherwise ({len(errors)} did: {errors[:1]})": not errors,
        f"generated: {came} came <= {metrics.generated} <= {most} asked for": came <= metrics.generated <= most,
        f"accepted: {usages.accepted} by usages <= {metrics.accepted} <= {most}": usages.accepted <= metrics.accepted <= most,
        f"drafted: {usages.drafted} by usages <= {metrics.drafted}": usages.drafted <= metrics.drafted,
    }


def main(arguments: list[str], flags: list[str]) -> int:
    """1 if something does not hold."""
    parser = argparse.ArgumentParser("speculative.py counters", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    rng = Random(args.seed)
    server = Server(FAKE, [*FLAGS, *flags])
    checks: dict[str, bool] = {}
    try:
        for are_exact, count in ((True, args.count), (False, max(1, args.count // 10))):
            made = plans(count, rng, are_exact=are_exact)
            before = counted(server)
            answers = asyncio.run(Clients(server.port, args.at_once).run(made))
            metrics = counted(server) - before
            reasons = Counter(reason for one in answers for reason in one.reasons)
            print(f"{count} requests: choices ended by {dict(reasons)}", flush=True)
            checks |= (exact_checks if are_exact else loose_checks)(made, answers, metrics)
        tree, problems = server.get("/cache"), server.problems()
        print(f"{int(server.metrics()[PREEMPTED])} preemptions")
        checks |= {
            f"tree {tree['evictable_tokens']} + free {tree['free_tokens']} = total {tree['total_tokens']} tokens": (
                tree["evictable_tokens"] + tree["free_tokens"] == tree["total_tokens"]
            ),
            f"nothing was logged ({len(problems)}: {problems[:1]})": not problems,
        }
    finally:
        server.close()
    for words, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {words}")
    return 0 if all(checks.values()) else 1
