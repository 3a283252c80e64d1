"""A head on the target's stream as the drafter of a GPU's runner: what heads.py is on a CPU.

It follows every token, wanted or not: what it reads is there only in the step. Behind each it remembers, in one pass over the
step's own tokens, the pair of every position: what the target left of it (ops.Shown), and the token behind it. That one is the
next of a prompt, or what was sampled; behind a wrong guess it is neither, but such a position is computed anew, and so is its
pair. Rows that want guesses then have the pair before their newest token computed to the end, wherever that is, and on its state
guess after guess. Where rows end only the device knows (kernels/impl/triton_guesses.py).

Owns the drafter's graphs, one for each of the target's captured steps and for each number of rows that guess, what was known of
each request when it came, and the last position of slots whose next token is not known yet: a sample that nobody wanted, in whose
place others come. Its keys and values lie in a pool of its own, under the page numbers of the target's.

Shape letters: T tokens of a step, R rows, S slots, X width of what the target shows, E hidden size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_state import DeviceState, Loaded, StepSize
from streamserve.engine.drafters.device_drafter import Guesses
from streamserve.engine.drafters.device_passes import MAX_ROWS, Array, Asked, DevicePasses, up
from streamserve.engine.plan import Plan, Row
from streamserve.kernels.devices.device import Device, Replay
from streamserve.kernels.impl.triton_guesses import AskedRows, Pass
from streamserve.kernels.ops import StepInputs
from streamserve.messages import MEDIA_BASE
from streamserve.models.device_heads import DeviceHead


def max_guessing_rows(num_slots: int) -> int:
    """Most rows of a pass that attend."""
    return min(num_slots, MAX_ROWS)


class _Known(NamedTuple):
    """A token that the host knows, and no row of the step holds: the one behind a piece of a prompt."""

    slot: int
    position: int
    token_id: int


class DeviceHeadDrafter:
    """Implements DeviceDrafter. `pool`: the target's pages, then num_own_pages(). `state`: of the target. `vocab_size`: the
    target's tokens."""

    def __init__(
        self,
        device: Device,
        head: DeviceHead,
        pool: DevicePool,
        state: DeviceState,
        *,
        vocab_size: int,
        max_len: int,
        max_drafts: int,
        use_graphs: bool = True,
    ) -> None:
        self._device, self._head, self._pool, self._state = device, head, pool, state
        self._use_graphs = use_graphs
        dtype, where = pool.k.dtype, device.torch_device
        self._shown_TX = state.show(head.layers, head.hidden_size, dtype)
        self._step = up(state.num_slots)
        self._passes = DevicePasses(
            *(device, pool, state),
            vocab_size=vocab_size,
            num_choices=head.num_choices,
            max_len=max_len,
            max_drafts=max_drafts,
            window=1,
            num_words=3 * self._step,  # tokens that the host knows: they, their positions, their slots
        )
        self._behind_T = torch.zeros(len(self._shown_TX), dtype=torch.int32, device=where)
        self._shown_R = torch.zeros(self._passes.max_rows, dtype=torch.int32, device=where)
        self._kept_SX = torch.zeros((state.num_slots, self._shown_TX.shape[1]), dtype=dtype, device=where)
        self._waiting: dict[int, int] = {}  # by slot: its last position, of which `_kept_SX` has what the target left
        self._histories: dict[int, tuple[int, ...]] = {}  # by slot: what was known at admission
        self._prompt_lens: dict[int, int] = {}
        self._remembering: dict[StepSize, Replay[None]] = {}

    def warm_up_long(self, max_len: int, max_chunk: int) -> None:
        """See DeviceDrafter. Prompts are not attended to."""

    def warm_up(self) -> None:
        """See DeviceDrafter."""
        self._passes.warm_up(self._guess)

    def capture(self, sizes: Sequence[StepSize], progress: Callable[[int, int], None]) -> None:
        """See DeviceDrafter. The largest first: the smaller ones reuse its memory."""
        if not self._use_graphs:
            return
        num_graphs = len(sizes) + len(self._passes.row_sizes)
        for size in sorted(sizes, key=lambda size: -size.num_tokens):
            remember = partial(self._remember, self._state.surplus_inputs(size))
            self._remembering[size] = self._device.capture(remember, is_warm=bool(self._remembering))
            progress(len(self._remembering), num_graphs)
        self._passes.capture(self._guess, lambda count: progress(len(self._remembering) + count, num_graphs))

    def follow(self, plan: Plan, loaded: Loaded, unwanted: frozenset[int]) -> Guesses | None:
        """See DeviceDrafter."""
        for admission in plan.admissions:
            self._histories[admission.slot] = admission.history
            self._prompt_lens[admission.slot] = admission.num_prompt
            self._waiting.pop(admission.slot, None)
        self._passes.copy_pages(plan)
        self._resume(plan.rows)
        firsts = _firsts(plan.rows, loaded.inputs)
        asking, known, waiting = self._share_out(plan.rows, firsts, unwanted)
        num_rows = self._say(asking, known)
        if loaded.size in self._remembering:
            self._remembering[loaded.size].replay()
        elif len(loaded.inputs.tokens_T):
            self._remember(loaded.inputs)
        for i in waiting:
            row = plan.rows[i]
            last = 0 if row.num_drafts else row.num_tokens - 1  # nobody knows which guesses were right
            self._kept_SX[row.slot].copy_(self._shown_TX[firsts[i] + last])
            self._waiting[row.slot] = row.start + last
        return self._passes.guess(self._guess, asking, num_rows) if asking else None

    def _share_out(
        self, rows: Sequence[Row], firsts: Sequence[int], unwanted: frozenset[int]
    ) -> tuple[list[Asked], list[_Known], list[int]]:
        """Which rows get guesses; which tokens behind rows are known here; and behind which rows it is not known yet at all."""
        asking: list[Asked] = []
        known: list[_Known] = []
        waiting: list[int] = []
        for i, row in enumerate(rows):
            if row.samples and i not in unwanted:
                if row.num_wanted > 0 and len(asking) < self._passes.max_rows:
                    num_pages = len(self._state.pages_of(row.slot))
                    asking.append(Asked(i, row.slot, self._prompt_lens[row.slot], row.start - firsts[i], num_pages))
                continue
            end, history = row.start + row.num_tokens, self._histories[row.slot]
            if not row.samples and end < len(history):
                known.append(_Known(row.slot, end, min(history[end], MEDIA_BASE)))
            else:
                waiting.append(i)
        return asking, known, waiting

    def _say(self, asking: Sequence[Asked], known: Sequence[_Known]) -> int:
        """Bring that to the device. Returns the number of rows, surplus ones included, that guess."""
        if not asking and not known:
            return 0
        array = self._passes.begin()
        num_rows = self._passes.ask(asking, array)
        at, step = self._passes.words_at, self._step
        if known:
            tokens, positions, slots = self._words(array)
            for i, one in enumerate(known):
                slots[i], positions[i], tokens[i] = one
        self._passes.say(at + (3 * step if known else 0))
        if known:
            ints = self._passes.ints[at : at + 3 * step].view(3, step)[:, : len(known)]
            self._passes.kernels.note(*ints.unbind(0))
        return num_rows

    def _words(self, array: Array) -> Array:
        """Where the host says what tokens it knows: these, their positions, their slots."""
        at = self._passes.words_at
        words: Array = array[at : at + 3 * self._step].reshape(3, -1)
        return words

    def _resume(self, rows: Sequence[Row]) -> None:
        """Pairs of last positions behind which it was not known how they go on, and of which it is now. Few and seldom."""
        if not self._waiting:
            return
        pairs = []
        for row in rows:
            position = self._waiting.pop(row.slot, None)
            if position is not None and position == row.start - 1:
                assert row.token_ids is not None
                pairs.append((row.token_ids[0], position, row.slot))
        if not pairs:
            return
        words = self._passes.send(torch.tensor(pairs, dtype=torch.int32).T.contiguous())
        tokens_R, positions_R, slots_R = words.unbind(0)
        features_RE = self._head.features(self._kept_SX.index_select(0, slots_R))
        read = Pass(tokens_R, positions_R, slots_R)
        self._head.remember(features_RE, self._passes.inputs(read, self._state.page_table_SP))

    def _remember(self, inputs: StepInputs) -> None:
        """The pairs of a step's positions."""
        num_tokens = len(inputs.tokens_T)
        behind_T, kernels = self._behind_T[:num_tokens], self._passes.kernels
        kernels.note(inputs.tokens_T, inputs.positions_T, inputs.slots_T)
        if num_logits := len(inputs.logit_slots_R):
            sampled_at_R = inputs.positions_T.index_select(0, inputs.logit_rows_R) + 1
            kernels.note(self._state.sampled_R[:num_logits], sampled_at_R, inputs.logit_slots_R)
        kernels.read(behind_T, inputs.positions_T + 1, inputs.slots_T)
        features_TE = self._head.features(self._shown_TX[:num_tokens])
        read = Pass(behind_T, inputs.positions_T, inputs.slots_T)
        self._head.remember(features_TE, self._passes.inputs(read, self._state.page_table_SP))

    def _guess(self, num_rows: int) -> None:
        """Guesses behind the newest tokens of so many rows."""
        passes, state = self._passes, self._state
        rows, shown_R, first = passes.rows(num_rows), self._shown_R[:num_rows], passes.further(num_rows)
        newest_R = passes.newest_R[:num_rows]
        places = newest_R, shown_R, first
        passes.kernels.newest_pairs(rows, state.params_SP, state.last_token_S, *places, num_shown=len(self._shown_TX))
        table_RP = passes.table(rows)
        features_RE = self._head.features(self._shown_TX.index_select(0, shown_R))
        states_RE = self._head.guess(features_RE, passes.inputs(first, table_RP))
        self._choose(states_RE, rows, 0)
        for guess in range(1, passes.max_drafts):
            further = passes.next_tokens(rows, guess - 1, guess - 1)
            states_RE = self._head.guess(states_RE, passes.inputs(further, table_RP))
            self._choose(states_RE, rows, guess)

    def _choose(self, states_RE: Tensor, rows: AskedRows, guess: int) -> None:
        """Guess number `guess` of each row."""
        self._head.logits(states_RE, self._passes.logits(len(states_RE)))
        self._passes.choose(rows, guess, self._head.token_ids_V)


def _firsts(rows: Sequence[Row], inputs: StepInputs) -> list[int]:
    """Of each row its first line in the step: rows that are no prompts come first, in their order."""
    of_prompts = {prompt.slot: prompt.first for prompt in inputs.prompts}
    at = accumulate((row.num_tokens for row in rows if row.slot not in of_prompts), initial=0)
    return [of_prompts[row.slot] if row.slot in of_prompts else next(at) for row in rows]
