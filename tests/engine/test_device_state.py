"""How a plan reaches the GPU: the integers of a step, padded to the size of a captured one, in the interpreter."""

import pytest
import torch

from tests.kernels.devices import HAS_GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton, if only its interpreter", allow_module_level=True)

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_runner import graph_sizes
from streamserve.engine.device_state import MAX_DRAFTED_TOKENS, MAX_PROMPTS, DeviceState, Sizes, StepSize, max_decode_rows
from streamserve.engine.plan import Admission, Plan, Row
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.ops import Grouping
from streamserve.messages import SamplingParams
from tests.kernels.paged import Shape

# decode rows, prompt tokens, in groups?
SIZES = (
    *(StepSize(2), StepSize(4), StepSize(16), StepSize(0, 8), StepSize(4, 8), StepSize(4, 32), StepSize(16, 0, True)),
    *(StepSize(3, is_drafted=True), StepSize(12, is_drafted=True), StepSize(6, 8, False, True)),
)
GROUPING = Grouping(rows=4, tile_len=32, programs=6)
PAGE = 16


def state(num_slots: int = 12) -> DeviceState:
    device = CUDA() if HAS_GPU else Host()
    pool = DevicePool(Shape(), num_pages=600, page_size=PAGE, dtype=torch.float32, device=device.torch_device)
    made = DeviceState(
        device,
        pool,
        num_slots=num_slots,
        max_len=512,
        max_step_tokens=64,
        sizes=SIZES,
        grouping=GROUPING,
        may_capture=lambda rows: all(row.num_tokens != 7 for row in rows),
        max_drafts=3,
    )
    made.captured(SIZES)
    return made


def admission(slot: int) -> Admission:
    return Admission(slot, SamplingParams(temperature=0.0), (1, 2), 2, 0)


def load(of: DeviceState, *rows: Row, admitted: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
    return of.load(Plan(1, tuple(map(admission, admitted)), (), rows), [(slot, (0,) * 8) for slot in admitted])


def test_the_smallest_size_that_holds_a_step_is_taken() -> None:
    sizes = Sizes(SIZES)
    assert sizes.fitting(1, []) == StepSize(2, 0, False)
    assert sizes.fitting(3, []) == StepSize(4, 0, False)
    assert sizes.fitting(17, []) is None
    assert sizes.fitting(0, [3, 5]) == StepSize(0, 8, False)
    assert sizes.fitting(1, [3, 5]) == StepSize(4, 8, False)
    assert sizes.fitting(1, [9]) == StepSize(4, 32, False)
    assert sizes.fitting(0, [9]) is None  # 0 rows end at 8 tokens: not looked for among more rows
    assert sizes.fitting(5, [1]) is None
    assert sizes.fitting(0, [1] * (MAX_PROMPTS + 1)) is None
    assert sizes.fitting(9, [], is_grouped=True) == StepSize(16, 0, True)
    assert sizes.fitting(2, [4], is_grouped=True) is None
    assert sizes.fitting(2, [], is_drafted=True) == StepSize(3, is_drafted=True)
    assert sizes.fitting(4, [], is_drafted=True) == StepSize(12, is_drafted=True)
    assert sizes.fitting(2, [4], is_drafted=True) == StepSize(6, 8, False, True)
    assert sizes.fitting(2, [9], is_drafted=True) is None and sizes.fitting(13, [], is_drafted=True) is None


@pytest.mark.parametrize("has_groups", [False, True])
def test_every_step_up_to_the_largest_has_a_size(has_groups: bool) -> None:
    sizes = Sizes(graph_sizes(100, 3000, has_groups=has_groups, max_drafted=250))
    for rows in range(2, 251):
        drafted = sizes.fitting(rows, [], is_drafted=True)
        assert drafted is not None and rows <= drafted.num_decode < 2 * rows
        mixed = [sizes.fitting(rows, [tokens], is_drafted=True) for tokens in (1, 64, 65, 1024)]
        assert all(size is not None and size.is_drafted and size.num_decode >= rows for size in mixed)
    for rows in range(101):
        for tokens in (0, 1, 64, 65, 1000, 1024):
            if rows or tokens:
                size = sizes.fitting(rows, [tokens] if tokens else [], is_grouped=has_groups and rows > 0)
                assert size is not None and size.num_decode >= rows and size.num_prompt >= tokens
    for tokens in (1025, 1600, 2999, 3000):
        assert (found := sizes.fitting(0, [tokens])) is not None and found.num_prompt >= tokens
    assert sizes.fitting(0, [3001]) is None and sizes.fitting(101, []) is None


def test_a_captured_step_is_padded_with_surplus_rows_and_tokens() -> None:
    of = state()
    load(of, Row(3, 0, 1, (9,), (7, 8)), Row(5, 0, 1, (9,), (1,)), admitted=(3, 5))
    of.last_token_S[3] = 41
    prompt = Row(6, 0, 3, (10, 11, 12), (2,), samples=False)
    other = Row(7, 16, 4, (20, 21, 22, 23), (4, 5))
    loaded = load(of, Row(3, 20, 1, None), prompt, Row(5, 8, 1, (44,)), other, admitted=(6, 7))
    inputs = loaded.inputs
    assert loaded.size == StepSize(4, 8, False) and inputs.num_decode == 4
    assert inputs.tokens_T.tolist() == [41, 44, 0, 0, 10, 11, 12, 20, 21, 22, 23, 0]
    assert inputs.positions_T.tolist() == [20, 8, 0, 0, 0, 1, 2, 16, 17, 18, 19, 0]
    assert inputs.slots_T.tolist() == [3, 5, -1, -1, 6, 6, 6, 7, 7, 7, 7, -1]
    assert [(row.slot, row.first, row.num_tokens, row.start) for row in inputs.prompts] == [(6, 4, 3, 0), (7, 7, 4, 16)]
    where = of.surplus_inputs(loaded.size)  # where the graph looks; this overwrites the integers
    assert where.prompt_starts.data_ptr() == inputs.prompt_starts.data_ptr() and len(where.prompt_starts) == MAX_PROMPTS + 1
    assert where.logit_rows_R.data_ptr() == inputs.logit_rows_R.data_ptr() and len(where.logit_rows_R) == 4 + MAX_PROMPTS
    loaded = load(of, Row(3, 21, 1, None), Row(7, 20, 2, (1, 2)), admitted=())
    assert loaded.sampling == [0, 1] and loaded.slots == [3, 7]
    assert loaded.inputs.logit_rows_R.tolist() == [0, 5] + [0] * (2 + MAX_PROMPTS)
    assert loaded.inputs.logit_slots_R.tolist() == [3, 7] + [-1] * (2 + MAX_PROMPTS)
    assert loaded.inputs.prompt_starts.tolist() == [4] + [6] * MAX_PROMPTS
    assert of.page_table_SP[7, :2].tolist() == [4, 5] and of.page_table_SP[3, :2].tolist() == [7, 8]


def test_what_no_size_holds_is_as_long_as_it_is() -> None:
    of = state()
    load(of, *(Row(slot, 0, 1, (9,), (slot,)) for slot in range(3)), admitted=(0, 1, 2))
    for rows in (
        (Row(0, 1, 1, None), Row(1, 1, 33, (5,) * 33)),
        (Row(0, 2, 1, None), Row(1, 1, 7, (5,) * 7)),  # may not be captured
        (Row(0, 3, 1, None), Row(1, 1, 4, (5,) * 4, wants_all_logits=True)),
    ):
        loaded = load(of, *rows)
        num_tokens = 1 + rows[1].num_tokens
        assert loaded.size is None and len(loaded.inputs.tokens_T) == num_tokens
        assert loaded.inputs.logit_rows_R.tolist() == [0, num_tokens - 1]
        assert loaded.inputs.prompt_starts.tolist() == [1, num_tokens]


def test_rows_that_share_much_are_grouped_and_only_those() -> None:
    of = state()
    common = tuple(range(100, 132))  # 512 tokens less one page's place
    rows = [Row(slot, 500, 1, (1,), common if slot < 8 else tuple(range(200 + 32 * slot, 232 + 32 * slot))) for slot in range(10)]
    loaded = load(of, *rows, admitted=tuple(range(10)))
    assert loaded.size == StepSize(16, 0, True)
    parts_PR = loaded.inputs.parts_PR
    assert parts_PR is not None and parts_PR.shape == (16 + GROUPING.programs, GROUPING.rows + 3)
    lines = [line for line in parts_PR.tolist() if line[0] >= 0]
    groups = {tuple(line[:4]) for line in lines if line[4]}
    assert len(groups) == 2 and sorted(row for group in groups for row in group) == list(range(8))
    assert {line[0] for line in lines if not line[4]} == {8, 9}
    assert all(line[4] in (0, 480) for line in lines)
    again = load(of, *(Row(slot, 501, 1, None) for slot in range(10)))
    assert again.inputs.parts_PR is not None and again.inputs.parts_PR.tolist() == parts_PR.tolist()
    fewer = load(of, *(Row(slot, 502, 1, None) for slot in (0, 1, 2, 8, 9)))  # too few rows to look
    assert fewer.size == StepSize(16, 0, False) and fewer.inputs.parts_PR is None
    # Slot 0 is taken by a request with pages of its own: what was found before must not be used again.
    new = Row(0, 500, 1, (1,), tuple(range(160, 192)))
    own = load(of, new, *(Row(slot, 503, 1, None) for slot in range(1, 10)), admitted=(0,))
    assert own.inputs.parts_PR is not None
    assert all(0 not in line[:4] or line[4] == 0 for line in own.inputs.parts_PR.tolist())


def test_guesses_are_decode_rows_behind_their_known_token() -> None:
    of = state()
    load(of, *(Row(slot, 0, 1, (9,), (slot,)) for slot in range(4)), admitted=(0, 1, 2, 3))
    of.last_token_S[1] = 41
    rows = (Row(0, 5, 3, (10, 11, 12), num_drafts=2), Row(1, 7, 1, None), Row(3, 14, 4, (20, 21, 22, 23), (50,), num_drafts=3))
    loaded = load(of, *rows)
    inputs = loaded.inputs
    assert loaded.size == StepSize(12, is_drafted=True) and inputs.is_drafted and inputs.num_decode == 12
    assert inputs.tokens_T.tolist() == [10, 11, 12, 41, 20, 21, 22, 23, 0, 0, 0, 0]
    assert inputs.positions_T.tolist() == [5, 6, 7, 7, 14, 15, 16, 17, 0, 0, 0, 0]
    assert inputs.slots_T.tolist() == inputs.logit_slots_R.tolist() == [0, 0, 0, 1, 3, 3, 3, 3, -1, -1, -1, -1]
    assert loaded.sampling == [0, 1, 2] and loaded.slots == [0, 0, 0, 1, 3, 3, 3, 3]
    assert loaded.drafted is not None and loaded.drafted.offsets == [0, 1, 2, 0, 0, 1, 2, 3]
    assert loaded.drafted.on_device.offsets_R.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 0, 0, 0]
    assert loaded.drafted.on_device.fed_R.tolist() == inputs.tokens_T.tolist()
    where = of.surplus_inputs(loaded.size)
    assert where.is_drafted and where.logit_slots_R.data_ptr() == inputs.logit_slots_R.data_ptr()
    plain = load(of, Row(0, 8, 1, None), Row(1, 8, 1, None))
    assert plain.drafted is None and not plain.inputs.is_drafted and plain.size == StepSize(2)


@pytest.mark.parametrize("is_captured", [True, False])
def test_guesses_go_with_prompts(is_captured: bool) -> None:
    of = state()
    load(of, Row(0, 0, 1, (9,), (1,)), Row(1, 0, 1, (9,), (2,)), admitted=(0, 1, 2))
    prompt = Row(2, 0, 3, (30, 31, 32), (3,)) if is_captured else Row(2, 0, 7, (30,) * 7, (3,))
    loaded = load(of, prompt, Row(0, 5, 2, (10, 11), num_drafts=1), Row(1, 4, 1, (7,)))
    inputs, rest = loaded.inputs, 3 + MAX_PROMPTS - 1 if is_captured else 0
    assert loaded.size == (StepSize(6, 8, False, True) if is_captured else None) and inputs.is_drafted
    assert inputs.num_decode == (6 if is_captured else 3)
    assert loaded.sampling == [1, 2, 0] and loaded.slots == [0, 0, 1, 2]
    assert inputs.logit_slots_R.tolist() == [0, 0, 1, 2] + [-1] * rest
    assert inputs.logit_rows_R.tolist() == [0, 1, 2, 8 if is_captured else 9] + [0] * rest
    assert inputs.tokens_T.tolist()[: inputs.num_decode] == [10, 11, 7, 0, 0, 0][: inputs.num_decode]
    assert loaded.drafted is not None and loaded.drafted.offsets == [0, 1, 0, 0]
    assert loaded.drafted.on_device.offsets_R.tolist() == [0, 1, 0, 0] + [0] * rest


def test_the_most_decode_rows_are_those_of_a_step_with_guesses_if_slots_are_few() -> None:
    assert max_decode_rows(4, 0) == 4 and max_decode_rows(4, 7) == 32
    assert max_decode_rows(200, 4) == MAX_DRAFTED_TOKENS and max_decode_rows(400, 4) == 400
    of = state(num_slots=1)
    load(of, Row(0, 0, 1, (9,), (1,)), admitted=(0,))
    loaded = load(of, Row(0, 5, 4, (1, 2, 3, 4), num_drafts=3))
    assert len(loaded.inputs.logit_slots_R) <= of.max_logits == 4 + MAX_PROMPTS
