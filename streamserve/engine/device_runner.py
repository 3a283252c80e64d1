"""Executes plans on a GPU. Every call only launches work; a step is awaited through its event.

Owns the captured graphs, the logits buffer and the buffers in which tokens come back. Launches run on the event loop: they
take microseconds and never wait. One helper thread blocks on the event of the running step, with the GIL released.

Steps replay graphs captured at start, one per size (surplus rows and tokens do nothing), but for those with so many prompt
tokens that the arithmetic outlasts the launches, and those whose launches the host has to choose: these are launched kernel by
kernel.
"""

import gc
from asyncio import get_running_loop, sleep
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_embeddings import DeviceEmbeddings
from streamserve.engine.device_sampler import DeviceSampler, Pending
from streamserve.engine.device_state import (
    GROUPED_ROWS,
    MAX_PROMPTS,
    DeviceState,
    Loaded,
    StepSize,
    max_decode_rows,
)
from streamserve.engine.drafters.device_drafter import DeviceDrafter, Guesses
from streamserve.engine.plan import NO_EDITS, Admission, Edits, Plan, Row, RowResult, StepResult
from streamserve.kernels.devices.device import Device, Event, Replay
from streamserve.kernels.impl.triton_sampling import MAX_DRAFTS
from streamserve.kernels.ops import DeviceNetwork, StepInputs
from streamserve.messages import SamplingParams

_BACKS = 2  # steps whose tokens are on their way at once
_SLICE = 256  # tokens of a prompt whose logits are looked at in one go

# Decode rows and prompt tokens of captured steps.
_MIXED_ROWS = (0, 8, 32, 64, 128)
_PROMPT_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024)
_MORE_TOKENS = 512  # between the sizes of steps with more prompt tokens, which no decode row takes part in
_GROUPED_ROWS, _GROUPED_TOKENS = (16, 32, 64, 128), (128, 256, 512, 1024)
# Of steps with guesses, which are decode rows here: alone, and with prompts. Larger batches have few.
_DRAFTED_ALONE = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
_DRAFTED_ROWS, _DRAFTED_TOKENS = (8, 32, 96), (64, 128, 256, 512, 1024)


def graph_sizes(max_rows: int, max_prompt: int, *, has_groups: bool = False, max_drafted: int = 0) -> tuple[StepSize, ...]:
    """Sizes of steps that get a graph of their own, dense where surplus rows and tokens cost most. Steps of up to `max_rows`
    decode rows are covered, in groups too if there are any, and with them up to 1,024 prompt tokens; prompts alone up to
    `max_prompt` tokens; decode rows and guesses together up to `max_drafted`, and with them up to 1,024 prompt tokens."""
    alone = _up_to(max_rows, (1, 2, 4, *range(8, 65, 8), *range(80, max_rows + 1, 16)))
    mixed = _up_to(min(max_prompt, _PROMPT_TOKENS[-1]), _PROMPT_TOKENS)
    more = _up_to(max_prompt, (*_PROMPT_TOKENS, *range(_PROMPT_TOKENS[-1] + _MORE_TOKENS, max_prompt + 1, _MORE_TOKENS)))
    sizes = [StepSize(rows) for rows in alone]
    sizes += [StepSize(rows, tokens) for rows in _up_to(max_rows, _MIXED_ROWS) for tokens in (more if rows == 0 else mixed)]
    if has_groups and max_rows >= GROUPED_ROWS:
        tokens = (0, *_up_to(min(max_prompt, _GROUPED_TOKENS[-1]), _GROUPED_TOKENS))
        sizes += [StepSize(rows, some, True) for rows in _up_to(max_rows, _GROUPED_ROWS) for some in tokens]
    if max_drafted:
        most = min(max_prompt, _DRAFTED_TOKENS[-1])
        sizes += [StepSize(rows, is_drafted=True) for rows in _up_to(max_drafted, _DRAFTED_ALONE)]
        sizes += [
            StepSize(rows, some, False, True)
            for rows in _up_to(max_drafted, _DRAFTED_ROWS)
            for some in _up_to(most, _DRAFTED_TOKENS)
        ]
    return tuple(sizes)


def _owners(plan: Plan, sampling: Sequence[int]) -> list[int]:
    """The plan's row of each logit row, where rows have guesses."""
    return [i for i in sampling for _ in range(1 + plan.rows[i].num_drafts)]


def _masked(plan: Plan, loaded: Loaded, edits: Edits) -> list[int]:
    """The row of logits of each mask."""
    first, num_rows = {}, 0
    for i in loaded.sampling:
        first[i] = num_rows
        num_rows += 1 + plan.rows[i].num_drafts
    return [first[row] + num_drafts for row, num_drafts in edits.masked]


def _up_to(limit: int, values: Sequence[int]) -> list[int]:
    """Those below the limit, and the limit."""
    return [value for value in values if value < limit] + [limit]


class Back(NamedTuple):
    """Where a step's tokens come back: host memory, the same as the host sees it, and the event behind them."""

    tokens_R: Tensor
    array: Any
    event: Event


class DeviceStep:
    """A step that was launched."""

    def __init__(
        self,
        choose: Callable[[Edits], tuple[Pending | None, Guesses | None]],
        back: Back,
        loaded: Loaded,
        plan: Plan,
        wait: ThreadPoolExecutor,
        prompt_logprobs: dict[int, list[tuple[Pending, list[int]]]],
        accepted: Callable[[int, int], None],
        failures: Callable[[], dict[bytes, str]],
    ) -> None:
        """`accepted` is told, by slot, how many guesses were right. `failures`: of encoders, since it was asked last."""
        self._choose = choose
        self._event = back.event
        self._tokens = back.array
        self._loaded = loaded
        self._plan = plan
        self._wait = wait
        self._pending: Pending | None = None
        self._guesses: Guesses | None = None
        self._unwanted: frozenset[int] | None = None  # None: not sampled yet
        self._prompt_logprobs = prompt_logprobs
        self._accepted = accepted
        self._failures = failures

    def sample(self, edits: Edits = NO_EDITS) -> None:
        """See Step."""
        assert self._unwanted is None
        self._unwanted = edits.unwanted
        self._pending, self._guesses = self._choose(edits)

    def is_done(self) -> bool:
        """See Step."""
        return self._unwanted is not None and self._event.query()

    async def done(self) -> StepResult:
        """See Step."""
        if not self._event.query():
            if self._loaded.drafted is not None:
                await self._watch()
            else:
                await get_running_loop().run_in_executor(self._wait, self._event.synchronize)
        return self.result()

    async def _watch(self) -> None:
        """Wait for a step behind which the device waits for the host: look at it all the time. To be woken takes longer, and a
        processor that has slept is slow: with both, 0.3 ms of a step of 5."""
        while not self._event.query():  # noqa: ASYNC110
            await sleep(0)

    def result(self) -> StepResult:
        """What the step brought. Its event must have come."""
        rows = self._rows()
        if self._guesses is not None:
            guesses = self._guesses.tokens_KR.T.tolist()
            for i, line in self._guesses.lines.items():
                rows[i] = rows[i].with_drafts(tuple(guesses[line][: self._plan.rows[i].num_wanted]))
        return StepResult(rows, self._failures())

    def _rows(self) -> list[RowResult]:
        """Tokens and log-probabilities."""
        assert self._unwanted is not None
        rows = [_NOTHING] * len(self._plan.rows)
        for i, parts in self._prompt_logprobs.items():
            entries = [entry for part, following in parts for row in part.read(following) for entry in row]
            rows[i] = RowResult(prompt_logprobs=tuple(entries))
        sampling = self._loaded.sampling
        tokens: list[int] = self._tokens[: len(self._loaded.slots)].tolist()
        if self._loaded.drafted is not None:
            self._verify(rows, tokens)
            return rows
        if self._pending is None and not self._prompt_logprobs:
            for i, token in zip(sampling, tokens, strict=True):
                if i not in self._unwanted:
                    rows[i] = RowResult((token,))
            return rows
        logprobs = [()] * len(sampling) if self._pending is None else self._pending.read(tokens)
        for i, token, entry in zip(sampling, tokens, logprobs, strict=True):
            if i in self._unwanted:
                continue
            rows[i] = RowResult((token,), tuple(entry), rows[i].prompt_logprobs)
        return rows

    def _verify(self, rows: list[RowResult], tokens: list[int]) -> None:
        """Fill `rows` of a step with guesses: as many tokens of each row as the device took."""
        assert self._unwanted is not None
        logprobs = [()] * len(tokens) if self._pending is None else self._pending.read(tokens)
        first = 0
        for i in self._loaded.sampling:
            row = self._plan.rows[i]
            end = first + row.num_drafts + 1
            if i not in self._unwanted:
                num_accepted = _num_right(row, tokens[first:end])
                taken = slice(first, first + num_accepted + 1)
                entries = tuple(entry for part in logprobs[taken] for entry in part)
                rows[i] = RowResult(tuple(tokens[taken]), entries, rows[i].prompt_logprobs)
                if row.num_drafts:
                    self._accepted(row.slot, num_accepted)
            first = end


def _num_right(row: Row, tokens: Sequence[int]) -> int:
    """How many of a row's guesses are what was sampled in their places."""
    num = 0
    while num < row.num_drafts:
        assert row.token_ids is not None
        if tokens[num] != row.token_ids[1 + num]:
            break
        num += 1
    return num


_NOTHING = RowResult()


class DeviceRunner:
    """Runner over a network on a GPU."""

    def __init__(
        self,
        device: Device,
        network: DeviceNetwork,
        pool: DevicePool,
        make_sampler: Callable[[DeviceState], DeviceSampler],
        *,
        vocab_size: int,
        num_slots: int,
        max_len: int,
        max_step_tokens: int,
        max_graph_tokens: int = 1024,
        use_graphs: bool = True,
        max_drafts: int = 0,
        make_drafter: Callable[[DeviceState], DeviceDrafter] | None = None,
        media: DeviceEmbeddings | None = None,
    ) -> None:
        """`max_graph_tokens`: most prompt tokens of a captured step. `max_drafts`: most guesses of a row. `make_drafter`: of a
        network that guesses; without it Row.num_wanted asks in vain. `media`: of a model that takes some."""
        assert max_drafts <= MAX_DRAFTS
        self._device = device
        self._network = network
        self._media = media or DeviceEmbeddings(device, None, num_slots=num_slots)
        self.long_chunk = network.long_chunk
        self.max_appended_rows: int | None = MAX_PROMPTS if use_graphs else None  # a captured step holds no more
        has_groups = network.grouping is not None
        most = min(max_graph_tokens, max_step_tokens)
        self.max_drafted_tokens: int | None = max_decode_rows(num_slots, max_drafts) if max_drafts else 0
        max_drafted = self.max_drafted_tokens
        self._sizes = graph_sizes(num_slots, most, has_groups=has_groups, max_drafted=max_drafted) if use_graphs else ()
        self._state = DeviceState(
            device,
            pool,
            num_slots=num_slots,
            max_len=max_len,
            max_step_tokens=max_step_tokens,
            sizes=self._sizes,
            grouping=network.grouping,
            may_capture=network.may_capture,
            max_drafts=max_drafts,
            media=self._media,
        )
        self._sampler = make_sampler(self._state)
        self._drafter = None if make_drafter is None else make_drafter(self._state)
        where = device.torch_device
        rows = self._state.max_logits
        self._logits_RV = torch.zeros((rows, vocab_size), dtype=torch.float32, device=where)
        self._tokens_R = self._state.sampled_R
        backs = [device.pinned((rows,), torch.int32) for _ in range(_BACKS)]
        self._backs = [Back(tokens_R, tokens_R.numpy(), device.event()) for tokens_R in backs]
        self._turn = 0
        self._graphs: dict[StepSize, Replay[None]] = {}
        self._choices: dict[StepSize, list[Replay[None]]] = {}  # of their tokens, one for each place where these come back
        self._histories: dict[int, tuple[int, ...]] = {}  # of slots whose prompt's log-probabilities are wanted
        self._wait = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-wait")

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture the graph of every size, the largest first: the smaller ones reuse its memory."""
        gc.collect()  # a graph or a tensor that the collector frees in the middle of a capture ends it
        gc.disable()
        try:
            for i, size in enumerate(sorted(self._sizes, key=lambda size: -size.num_tokens)):
                inputs = self._state.surplus_inputs(size)
                self._graphs[size] = self._device.capture(partial(self._compute, inputs), is_warm=i > 0)
                choices = [partial(self._choose_plainly, size, inputs, turn) for turn in range(_BACKS)]
                self._choices[size] = [self._device.capture(choice, is_warm=i > 0) for choice in choices]
                progress(i + 1, len(self._sizes))
            if self._drafter is not None:
                self._drafter.capture(self._sizes, progress)
            self._state.capture_intakes(self._sizes)
            self._state.captured(self._sizes)
        finally:
            gc.enable()

    @torch.inference_mode()
    def warm_up(self, chunk: int) -> None:
        """Run every kind of step on slots 0 and 1, the largest with a prompt of `chunk` tokens: kernels are compiled, and
        memory grows to what work takes. Before any request."""
        pages = tuple(range(self._state.num_pages(chunk)))
        greedy = SamplingParams(temperature=0.0)
        admissions = tuple(Admission(slot, greedy, (0,), 1, 0) for slot in range(min(2, self._state.num_slots)))
        prompt = Row(0, 0, chunk - 1, (0,) * (chunk - 1), pages)
        self.forward(Plan(0, admissions, (), (prompt,))).sample()
        decode = Row(0, chunk - 1, 1, (0,))
        rows = (decode, *(Row(a.slot, 0, 2, (0, 0), pages[:1]) for a in admissions[1:]))
        self.forward(Plan(0, (), (), rows)).sample()
        sizes = [StepSize(rows) for rows in (1, 2, 4, 8, 16) if rows <= self._state.num_slots]
        if self._network.grouping is not None and self._state.num_slots >= GROUPED_ROWS:
            sizes.append(StepSize(GROUPED_ROWS, 0, True))
        if self.max_drafted_tokens:
            few = [rows for rows in _DRAFTED_ALONE if rows <= 16 and rows < self.max_drafted_tokens]
            sizes += [StepSize(rows, is_drafted=True) for rows in (*few, self.max_drafted_tokens)]
        for size in sizes:
            self._compute(self._state.surplus_inputs(size))
        self._sampler.warm_up(self._logits_RV[:1], has_drafts=bool(self.max_drafted_tokens))
        if self._drafter is not None:
            self._drafter.warm_up()
        self._device.synchronize()

    @torch.inference_mode()
    def warm_up_long(self, max_len: int, max_chunk: int) -> None:
        """What long prompts need beyond `warm_up`: attention of a library over whole chunks."""
        inputs = self._state.surplus_inputs(StepSize(1))
        self._network.warm_up(inputs.k, inputs.v, max_len, max_chunk)
        if self._drafter is not None:
            self._drafter.warm_up_long(max_len, max_chunk)

    def _compute(self, inputs: StepInputs) -> None:
        hidden_RE = self._network.forward(inputs)
        self._network.logits(hidden_RE, self._logits_RV[: len(hidden_RE)])

    @torch.inference_mode()
    def forward(self, plan: Plan) -> DeviceStep:
        """See Runner."""
        params = [(admission.slot, self._sampler.admit(admission)) for admission in plan.admissions]
        params += [(append.slot, self._sampler.append(append)) for append in plan.appends]
        for admission in plan.admissions:
            if admission.sampling.prompt_logprobs is not None:
                self._histories[admission.slot] = admission.history
        self._media.take_in(plan)
        loaded = self._state.load(plan, params)
        prompt_logprobs: dict[int, list[tuple[Pending, list[int]]]] = {}
        if loaded.size is not None:
            self._graphs[loaded.size].replay()
        else:
            hidden_RE = self._forward(plan, loaded, prompt_logprobs)
            if loaded.sampling:
                self._network.logits(hidden_RE, self._logits_RV[: len(loaded.slots)])
        turn = self._turn
        self._turn = (turn + 1) % _BACKS
        choose = partial(self._choose, plan, loaded, turn)
        back, accepted = self._backs[turn], self._sampler.accepted
        return DeviceStep(choose, back, loaded, plan, self._wait, prompt_logprobs, accepted, self._media.failures)

    @torch.inference_mode()
    def _choose(self, plan: Plan, loaded: Loaded, turn: int, edits: Edits) -> tuple[Pending | None, Guesses | None]:
        """Launch the choice of tokens behind the rows, the guesses of what follows them, and the way of both to the host."""
        pending = None
        if loaded.sampling:
            choices = None if loaded.size is None else self._choices.get(loaded.size)
            # Of a plain row that nobody wants a token may be chosen: its slot is admitted or appended to before its next one.
            if choices is not None and self._sampler.is_plain(loaded.slots) and (loaded.drafted is None or not edits.unwanted):
                if edits.masked:
                    logits_RV = self._logits_RV[: len(loaded.inputs.logit_slots_R)]
                    self._sampler.mask(logits_RV, _masked(plan, loaded, edits), edits.masks)
                choices[turn].replay()
            else:
                pending = self._sample(plan, loaded, turn, edits)
        guesses = None if self._drafter is None else self._drafter.follow(plan, loaded, edits.unwanted)
        event = self._backs[turn].event
        event.record()
        self._media.launched(event)
        return pending, guesses

    def _sample(self, plan: Plan, loaded: Loaded, turn: int, edits: Edits) -> Pending | None:
        """The choice of tokens where a recording does not do."""
        slots_R, slots = loaded.inputs.logit_slots_R, loaded.slots
        num_rows = len(slots_R)
        if edits.unwanted:
            owners = loaded.sampling if loaded.drafted is None else _owners(plan, loaded.sampling)
            slots = [-1 if i in edits.unwanted else slot for i, slot in zip(owners, slots, strict=True)]
            slots_R = self._sampler.slots(slots, num_rows)
        tokens_R = self._tokens_R[:num_rows]
        masked = _masked(plan, loaded, edits)
        logits_RV = self._logits_RV[:num_rows]
        pending = self._sampler.sample(logits_RV, slots_R, slots, tokens_R, masked, edits.masks, loaded.drafted)
        self._backs[turn].tokens_R[:num_rows].copy_(tokens_R, non_blocking=True)
        return pending

    def _choose_plainly(self, size: StepSize, inputs: StepInputs, turn: int) -> None:
        """What `_choose` launches for rows that want nothing but a temperature."""
        num_rows = size.num_logits
        logits_RV, tokens_R = self._logits_RV[:num_rows], self._tokens_R[:num_rows]
        self._sampler.choose(logits_RV, inputs.logit_slots_R, tokens_R, self._state.drafted(size, inputs))
        self._backs[turn].tokens_R[:num_rows].copy_(tokens_R, non_blocking=True)

    def _forward(self, plan: Plan, loaded: Loaded, prompt_logprobs: dict[int, list[tuple[Pending, list[int]]]]) -> Tensor:
        """The stream of the rows that sample; fills `prompt_logprobs` for the rows that want all logits."""
        if not loaded.logit_tokens:
            return self._network.forward(loaded.inputs)
        hidden_TE = self._network.forward_all(loaded.inputs)
        for i, first in loaded.logit_tokens.items():
            prompt_logprobs[i] = self._prompt_logprobs(plan, i, hidden_TE, first)
        return hidden_TE.index_select(0, loaded.inputs.logit_rows_R)

    def _prompt_logprobs(self, plan: Plan, i: int, hidden_TE: Tensor, first: int) -> list[tuple[Pending, list[int]]]:
        """Log-probabilities of the tokens that follow each token of a row, a slice of the vocabulary products at a time."""
        row = plan.rows[i]
        following = self._following(plan, i)
        parts = []
        for at in range(0, len(following), _SLICE):
            tokens = following[at : at + _SLICE]
            logits = self._logits_RV.new_empty((len(tokens), self._logits_RV.shape[1]))
            self._network.logits(hidden_TE[first + at : first + at + len(tokens)], logits)
            parts.append((self._sampler.prompt_logprobs(logits, row.slot, tokens), list(tokens)))
        return parts

    def _following(self, plan: Plan, i: int) -> Sequence[int]:
        """The known tokens one place behind those of a row; the last one of a whole prompt has none."""
        row = plan.rows[i]
        return self._histories[row.slot][row.start + 1 : row.start + row.num_tokens + 1]

    def close(self) -> None:
        """End the helper thread."""
        self._media.close()
        self._device.synchronize()
        self._wait.shutdown(wait=True)
