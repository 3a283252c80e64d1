"""What each expression does to a program's transcript, and what it asks of the back end.

Owns the meaning of expressions. Knows no queue and no threads: the executor calls `perform` for one after another, on the
background loop.
"""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.lang.backend import Piece, Sampling
from streamserve.lang.dtypes import STOPS
from streamserve.lang.executor import HIDDEN, Executor, Fork, Join, SetVar, Work
from streamserve.lang.expressions import (
    Chain,
    Gen,
    Image,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    SeparateReasoning,
    Text,
    Video,
    thought_of,
)
from streamserve.lang.gates import gate_of, warm
from streamserve.lang.pictures import url_of
from streamserve.lang.transcript import Live


async def perform(executor: Executor, work: Work) -> None:
    """Does it. What it raises is the program's error."""
    script = executor.transcript
    match work:
        case Text():
            _say(executor, work.value)
        case Gen():
            await _generate(executor, work)
        case Select():
            await _select(executor, work)
        case Chain():
            for part in work.parts:
                await perform(executor, part)
        case RoleBegin():
            roles = await executor.backend.roles()
            executor.write(lambda: script.begin_role(work.role, roles, is_written=work.is_written))
            if work.role == "assistant" and executor.guesses is not None and executor.guesses.whole_turns:
                executor.turn_parts = []
        case RoleEnd():
            await _answer_turn(executor)
            roles = await executor.backend.roles()
            executor.write(lambda: script.end_role(work.role, roles))
        case Image():
            url = await asyncio.to_thread(url_of, work.source)
            marker = (await executor.backend.roles()).image
            executor.write(lambda: script.show(url, marker))
        case Video():
            raise InvalidRequest("videos go into chats over /v1/chat/completions; a program takes pictures: image(path)")
        case ScopeBegin():
            _refuse_inside_guess(executor, "a scope")
            executor.write(lambda: script.begin_scope(work.name))
        case ScopeEnd():
            _refuse_inside_guess(executor, "a scope")
            executor.write(lambda: script.end_scope(work.name))
        case SetVar():
            executor.write(lambda: script.variables.__setitem__(work.name, work.value))
        case SeparateReasoning():
            await _answer_turn(executor)
            _separate(executor, work)
        case Fork():
            await _fork(executor, work)
        case Join():
            await _join(executor, work)
        case _:
            raise TypeError(f"{work!r} cannot be done")


def _say(executor: Executor, text: str) -> None:
    if executor.turn_parts is not None:
        executor.turn_parts.append(text)
        return
    if executor.guesses is not None:
        executor.guesses.wrote(text)
    script = executor.transcript

    def write() -> None:
        script.text += text

    executor.write(write)


async def _generate(executor: Executor, node: Gen) -> None:
    sampling = _sampling(executor, node.sampling)
    if executor.turn_parts is not None:
        executor.turn_parts.append(replace(node, sampling=sampling))
        return
    script, backend = executor.transcript, executor.backend
    prompt = script.prompt()
    await _follow(executor)
    gate = gate_of(backend)
    if executor.guesses is not None:
        guesses = executor.guesses
        piece = await gate.call(lambda: guesses.generate(prompt, sampling))
        executor.write(lambda: script.answer(node.name, piece.text, piece.text, piece.meta))
    elif executor.streams and sampling.n in (None, 1):
        await _stream(executor, node, sampling)
    else:
        pieces = await gate.call(lambda: backend.generate(prompt, sampling))
        if sampling.n in (None, 1):
            executor.write(lambda: script.answer(node.name, pieces[0].text, pieces[0].text, pieces[0].meta))
        else:
            texts, metas = [piece.text for piece in pieces], [piece.meta for piece in pieces]
            executor.write(lambda: script.answer(node.name, texts[0], texts, metas))


async def _stream(executor: Executor, node: Gen, sampling: Sampling) -> None:
    script, backend = executor.transcript, executor.backend
    prompt, start, live = script.prompt(), len(script.text), Live()
    meta: dict[str, Any] = {}

    def begin() -> None:
        if node.name is not None:
            script.live[node.name] = live

    def more(piece: Piece) -> None:
        nonlocal meta
        meta = piece.meta or meta
        script.text += piece.text
        live.pieces.append(piece)

    def finish() -> None:
        live.is_done = True
        script.keep(node.name, start, script.text[start:], meta)

    executor.write(begin)
    async with aclosing(gate_of(backend).stream(lambda: backend.stream(prompt, sampling))) as pieces:
        async for piece in pieces:
            executor.write(partial(more, piece))
    executor.write(finish)


async def _select(executor: Executor, node: Select) -> None:
    script, backend = executor.transcript, executor.backend
    _refuse_inside_guess(executor, "a select")
    method = node.method
    if method is None:
        from streamserve.lang.choices import token_length_normalized

        method = token_length_normalized
    prompt = script.prompt()
    await _follow(executor)
    chosen = await gate_of(backend).call(lambda: backend.choose(prompt, node.choices, node.temperature, method))
    if executor.guesses is not None:
        executor.guesses.wrote(chosen.decision)
    executor.write(lambda: script.answer(node.name, chosen.decision, chosen.decision, chosen.meta))


def _refuse_inside_guess(executor: Executor, what: str) -> None:
    """What needs the words that stand before it cannot be where they come later."""
    if executor.turn_parts:
        raise InvalidRequest(f"with num_api_spec_tokens an assistant's turn is answered when it ends; {what} in it comes before")


async def _answer_turn(executor: Executor) -> None:
    """An assistant's turn ends whose answers were put off until now."""
    parts, executor.turn_parts = executor.turn_parts, None
    if parts is None or executor.guesses is None:
        return
    script, guesses = executor.transcript, executor.guesses
    nodes = [part for part in parts if isinstance(part, Gen)]
    asked = [part.sampling if isinstance(part, Gen) else part for part in parts]
    prompt = script.prompt()
    pieces = iter(await gate_of(executor.backend).call(lambda: guesses.turn(prompt, asked)) if nodes else ())

    def write() -> None:
        for part in parts:
            if isinstance(part, Gen):
                piece = next(pieces)
                script.answer(part.name, piece.text, piece.text, piece.meta)
            else:
                script.text += part

    executor.write(write)


def _sampling(executor: Executor, wanted: Sampling) -> Sampling:
    """The node's own, the run's defaults, and what ends a number."""
    sampling = wanted.over(executor.defaults)
    more = tuple(each for each in STOPS.get(sampling.dtype or "", ()) if each not in sampling.stop)
    return replace(sampling, stop=(*sampling.stop, *more)) if more else sampling


async def _follow(executor: Executor) -> None:
    leader, executor.leader = executor.leader, None
    if leader is not None:
        await leader.follow(executor.backend, executor.transcript.prompt())


async def _fork(executor: Executor, work: Fork) -> None:
    """Children begin with these words. Where there are several, the words are computed first: once, not once in each."""
    script = executor.transcript
    if len(work.children) > 1 and script.text and executor.turn_parts is None:
        prompt = script.prompt()
        await _follow(executor)
        await warm(executor.backend, prompt)
    for child in work.children:
        child.adopt(script.copy(), None if executor.turn_parts is None else list(executor.turn_parts))


async def _join(executor: Executor, work: Join) -> None:
    found = [await asyncio.wrap_future(mark.reached) for mark in work.marks]
    for child in found:
        if child.error is not None:
            raise child.error
    script = executor.transcript
    if work.appends:
        _say(executor, "".join(child.text for child in found))
        return
    gathered: dict[str, list[Any]] = {}
    for child in found:
        for name, value in child.variables.items():
            if name not in script.variables and not name.startswith(HIDDEN):
                gathered.setdefault(name, []).append(value)
    executor.write(lambda: script.variables.update(gathered))


def _separate(executor: Executor, work: SeparateReasoning) -> None:
    """Thoughts out of the text: what the program goes on from is the answers alone."""
    from streamserve.text.reasoning import find
    from streamserve.text.tools.format import Content, Thought

    format, script = find(work.format), executor.transcript
    if executor.streams:
        return
    for name in work.names:
        span, answer = script.span(name), script.variables.get(name)
        if span is None or not isinstance(answer, str):
            continue
        splitter = format.splitter(is_open=format.is_open(script.text[: span[0]]))
        events = [*splitter.push(answer), *splitter.finish()]
        thought = "".join(event.text for event in events if isinstance(event, Thought))
        rest = "".join(event.text for event in events if isinstance(event, Content))

        def write(name: str = name, thought: str = thought, rest: str = rest) -> None:
            script.rewrite(name, rest)
            script.variables[thought_of(name)] = thought

        executor.write(write)
