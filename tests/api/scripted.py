"""An engine that plays given deltas and writes down what it was asked: the other side of the seam, for tests of the API."""

from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import Mailbox
from streamserve.engine.inspector import Inspector
from streamserve.engine.policy import POLICIES
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.errors import StreamServeError
from streamserve.messages import (
    CacheSummary,
    Delta,
    EngineFacts,
    EngineLoad,
    FinishReason,
    GenerateRequest,
    PrefixSummary,
    TokenLogprobs,
)
from streamserve.text.byte_tokenizer import END_OF_TURN, byte_text_model

CONTEXT_LEN = 512
VOCAB_SIZE = byte_text_model().tokenizer.vocab_size

Script = Callable[[GenerateRequest], Sequence[Delta]]


class PlayedMailbox(Mailbox):
    """Gives one scripted delta per turn, then whatever is put."""

    __slots__ = ("played",)

    def __init__(self, request_id: str, deltas: Sequence[Delta]) -> None:
        super().__init__(request_id)
        self.played = deque(deltas)
        self._play()

    def take(self) -> Delta:
        delta = super().take()
        if self.played:
            self.played.popleft()
            self._play()
        return delta

    def _play(self) -> None:
        """The next delta can be taken; what was taken is no longer in `played`."""
        if self.played:
            self.put_nowait(self.played[0])


def says(text: str, *, finish: FinishReason | None = FinishReason.STOP, cached: int = 0) -> Script:
    """Answers with a text, one byte per delta, cut at max_new_tokens; ends with the end-of-turn token."""

    def script(request: GenerateRequest) -> list[Delta]:
        limit = request.sampling.max_new_tokens or CONTEXT_LEN - len(request.token_ids)
        ids = [*text.encode(), END_OF_TURN][:limit]
        deltas = [Delta((token,), _logprobs(request, token), None, cached) for token in ids]
        if request.sampling.prompt_logprobs is not None:
            scored = [None, *(TokenLogprobs(token, -0.25, ((token, -0.25),)) for token in request.token_ids[1:])]
            deltas[0] = replace(deltas[0], prompt_logprobs=tuple(scored))
        if finish is not None:
            ended = ids[-1] == END_OF_TURN
            reason, matched = (finish, END_OF_TURN) if ended else (FinishReason.LENGTH, None)
            deltas[-1] = replace(deltas[-1], finish_reason=reason, matched_stop=matched)
        return deltas

    return script


def _logprobs(request: GenerateRequest, token: int) -> tuple[TokenLogprobs, ...]:
    if request.sampling.logprobs is None:
        return ()
    others = tuple((other, -2.0 - other / 100) for other in range(65, 65 + 20))
    asked = tuple((other, -1.0 - other / 100) for other in request.sampling.logprob_token_ids)
    return (TokenLogprobs(token, -0.5, ((token, -0.5), *others)[: request.sampling.logprobs], asked),)


class ScriptedEngine:
    """EngineClient for tests. `requests` and `aborted` say what happened; `refusal` is raised by submit. `cache` is what its
    inspection shows; no request gets there."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or says("Hello!")
        self.requests: list[GenerateRequest] = []
        self.checked: list[str] = []  # grammars
        self.aborted: list[str] = []
        self.live: dict[str, PlayedMailbox] = {}
        self.refusal: StreamServeError | None = None
        self.cache = KVCache(40, 16, now=lambda: 0.0)
        self.inspection = Inspector(Scheduler(self.cache, Limits(4, 64, frozenset()), POLICIES["fcfs"]), lambda: 0.0)
        self.state = EngineFacts(CONTEXT_LEN, VOCAB_SIZE, frozenset({END_OF_TURN}), 16, load=EngineLoad(1, 2, 300, 40, 640))

    async def submit(self, request: GenerateRequest) -> Mailbox:
        if self.refusal is not None:
            raise self.refusal
        assert request.id not in self.live, "ids of live requests are unique"
        self.requests.append(request)
        self.live[request.id] = PlayedMailbox(request.id, self.script(request))
        return self.live[request.id]

    async def check_grammar(self, grammar: str, param: str) -> None:
        self.checked.append(grammar)
        if self.refusal is not None:
            raise self.refusal

    def abort(self, request_id: str) -> bool:
        mailbox = self.live.pop(request_id, None)
        if mailbox is None:
            return False
        if not any(delta.finish_reason for delta in mailbox.played):
            self.aborted.append(request_id)
            mailbox.put_nowait(Delta(finish_reason=FinishReason.ABORT))
        return True

    def end_thought(self, request_id: str) -> bool:
        return False

    def flush_cache(self) -> bool:
        return True

    def facts(self) -> EngineFacts:
        return self.state

    def cache_summary(self, max_prefixes: int = 10) -> CacheSummary:
        top = PrefixSummary(5, 0, 3, 1.5, tuple(b"Hi <b"))
        return CacheSummary(3, 48, 32, 300, 640, 200, 50, (top,))
