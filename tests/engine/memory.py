"""A fake runner with page memory: every position it reads must hold exactly this request's prefix.

Each (page, offset) remembers a hash of the whole prefix that was written there, as real KV does in effect. A page handed
to two writers, a missed copy or a stale page shows up at the first row that reads it. A wrong guess is written like a right one:
who reads it, or anything computed behind it, reads another prefix than its own.
"""

from streamserve.engine.fake import FakeRunner, FakeStep
from streamserve.engine.plan import Plan, Row
from streamserve.messages import TokenLogprobs


class MemoryRunner(FakeRunner):
    """FakeRunner that also writes, copies and checks page contents."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.memory: dict[tuple[int, int], int] = {}
        self.num_checked = 0

    def forward(self, plan: Plan) -> FakeStep:
        for copy in plan.copies:
            for offset in range(self._page_size):
                if (copy.src, offset) in self.memory:
                    self.memory[copy.dst, offset] = self.memory[copy.src, offset]
        return super().forward(plan)

    def _row(self, row: Row) -> tuple[TokenLogprobs, ...]:
        slot = self._slots[row.slot]
        result = super()._row(row)
        prefix = 0
        tokens = slot.tokens + list(row.token_ids[1:] if row.token_ids is not None and row.num_drafts else ())
        for position in range(row.start + row.num_tokens):
            prefix = hash((prefix, tokens[position]))
            place = slot.pages[position // self._page_size], position % self._page_size
            if position >= row.start:
                self.memory[place] = prefix
            else:
                assert self.memory.get(place) == prefix, f"position {position} of slot {row.slot} holds another prefix"
                self.num_checked += 1
        return result


def expected_tokens(runner: FakeRunner, prompt: list[int], count: int) -> list[int]:
    """What the fake model answers to a prompt."""
    from streamserve.engine.fake import _Slot
    from streamserve.messages import SamplingParams

    slot = _Slot(SamplingParams(ignore_eos=True), list(prompt), len(prompt))
    for _ in range(count):
        slot.tokens.append(runner._token(slot))
    return slot.tokens[len(prompt) :]
