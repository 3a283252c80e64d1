"""How an answer grows, and where it ends: by a token that was sampled, by those that its guide says must follow. Torch-free.

Works on one request for the scheduler, which owns it. Knows no step, no queue and no cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

from streamserve.engine.guide import Guide
from streamserve.engine.request import Request
from streamserve.messages import Delta, FinishReason, TokenLogprobs


class End(NamedTuple):
    """How an answer ended, if it did."""

    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    error: str | None = None  # what its guide says


GOES_ON = End()


def end_of(request: Request) -> End:
    """Whether the newest token ends the answer."""
    token = request.tokens[-1]
    if token in request.stop_ids and request.num_generated >= request.given.sampling.min_new_tokens:
        return End(FinishReason.STOP, token)
    if len(request.tokens) >= request.max_len:
        return End(FinishReason.LENGTH)
    return GOES_ON


def follow(request: Request, guide: Guide, token_id: int, *, is_last: bool = True) -> End:
    """Tell a request's guide of its newest token, and append what must follow. `is_last`: of those that came together."""
    end = end_of(request)
    if end.finish_reason is FinishReason.STOP:
        return end
    forced = guide.took(token_id, is_last=is_last)
    if not forced and guide.error is None and not guide.is_over:
        return end
    if end.finish_reason is None or guide.error is not None or (guide.is_over and not forced):
        return append_forced(request, guide, forced)
    return end


def append_forced(request: Request, guide: Guide, token_ids: Sequence[int]) -> End:
    """Known tokens join the answer, up to where it ends. What a guide says of its end holds behind them. Samples that are under
    way in their places are unwanted."""
    for i, token_id in enumerate(token_ids, 1):
        request.jumped.append(len(request.tokens))
        request.tokens.append(token_id)
        request.appended.append(token_id)
        request.num_jumped += 1
        end = end_of(request)
        if end.finish_reason is not None and not (guide.is_over and i == len(token_ids)):
            return end
    if token_ids:
        request.offered = ()
    if guide.error is not None:
        return End(FinishReason.ERROR, error=guide.error)
    return End(FinishReason.STOP) if guide.is_over else GOES_ON


def delivery(request: Request, num_known: int, end: End, logprobs: tuple[TokenLogprobs, ...] = (), num_guessed: int = 0) -> Delta:
    """What the request has gained beyond `num_known` tokens, for its mailbox. The first `num_guessed` of that were guessed."""
    num_thought = 0 if request.guide is None else request.guide.num_thought
    if end is GOES_ON and request.has_begun and not request.num_drafted and not request.jumped:  # as nearly always
        token_ids = tuple(request.tokens[num_known:])
        return Delta(token_ids, logprobs, None, request.num_cached, None, None, None, request.num_jumped, num_thought)
    is_first, request.has_begun = not request.has_begun, True
    start = request.num_prompt if is_first else num_known  # an answer may begin with tokens that were appended
    token_ids = tuple(request.tokens[start:])
    wants_prompt = is_first and request.given.sampling.prompt_logprobs is not None
    jumped: tuple[bool, ...] = ()
    if request.jumped:
        places = set(request.jumped)
        jumped = tuple([place in places for place in range(start, len(request.tokens))])
        request.jumped.clear()
    request.num_jumped_sent = request.num_jumped
    return Delta(
        token_ids,
        logprobs,
        tuple(request.prompt_logprobs) if wants_prompt else None,
        request.num_cached,
        end.finish_reason,
        end.matched_stop,
        end.error,
        request.num_jumped,
        num_thought,
        end.error is not None,
        0,
        request.num_drafted,
        request.num_accepted,
        (True,) * num_guessed + (False,) * (len(token_ids) - num_guessed) if num_guessed else (),
        request.queued_s or 0.0 if is_first else 0.0,
        jumped,
    )


def last_words(request: Request, reason: FinishReason, error: str | None, *, is_grammar_error: bool) -> Delta:
    """The last delta of a request that ends without a new token."""
    return Delta(
        num_cached_tokens=request.num_cached,
        finish_reason=reason,
        error=error,
        num_jumped=request.num_jumped_sent,
        num_thought=0 if request.guide is None else request.guide.num_thought,
        is_grammar_error=is_grammar_error,
        num_drafted=request.num_drafted,
        num_accepted=request.num_accepted,
    )
