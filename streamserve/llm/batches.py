"""Many calls, some of them at a time, their answers in order; and a bar for those who look.

Owns how many are under way. Knows nothing of what is called.
"""

import sys
from asyncio import TaskGroup
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from streamserve.api.wire import one_error
from streamserve.errors import StreamServeError
from streamserve.lang.progress import counting

T = TypeVar("T")


async def all_of(
    calls: Sequence[Callable[[], Awaitable[T]]],
    most: int,
    *,
    keeps_errors: bool = False,
    done: Callable[[], object] | None = None,
) -> list[T | StreamServeError]:
    """The answers, in the order of the calls, of which `most` are under way at a time. The first that fails ends them all; with
    `keeps_errors` its error stands in the answer's place, and the others go on. `done` is called behind each: then a call is
    somebody's, and errors say which it was."""
    answers: list[T | StreamServeError | None] = [None] * len(calls)
    left = iter(enumerate(calls))

    async def work() -> None:
        for index, call in left:
            try:
                answers[index] = await call()
            except StreamServeError as error:
                if not keeps_errors:
                    if done is None or len(calls) == 1:
                        raise
                    error.args = (f"number {index} of {len(calls)}: {error}", *error.args[1:])
                    raise
                answers[index] = error
            if done is not None:
                done()

    with one_error():
        async with TaskGroup() as tasks:
            for _ in range(min(most, len(calls))):
                tasks.create_task(work())
    return answers  # type: ignore[return-value]  # every place is filled


def bar(total: int, is_wanted: bool | None) -> AbstractContextManager[Callable[[], None]]:
    """Called for each that is done. None: a bar is shown for several, where standard error is a terminal."""
    return counting(total, is_shown=total > 1 and sys.stderr.isatty() if is_wanted is None else is_wanted)
