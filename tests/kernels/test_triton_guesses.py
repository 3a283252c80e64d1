"""What a drafter's passes read, against lists."""

import pytest
import torch

from tests.kernels.devices import DEVICES, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton, if only its interpreter", allow_module_level=True)

from torch import Tensor

from streamserve.kernels.impl.triton_guesses import AskedRows, GuessKernels, Pass
from streamserve.kernels.impl.triton_sampling import NUM_WORDS

WHERE = DEVICES[0][0]
NUM_SLOTS, MAX_LEN, WINDOW, V = 4, 20, 5, 50


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=WHERE)


def empty_pass(num_tokens: int) -> Pass:
    return Pass(*(torch.full((num_tokens,), 77, dtype=torch.int32, device=WHERE) for _ in range(3)))


def kernels_of(texts: dict[int, list[int]]) -> GuessKernels:
    kernels = GuessKernels(NUM_SLOTS, MAX_LEN, window=WINDOW, vocab_size=V, device=torch.device(WHERE))
    for slot, text in texts.items():
        half = len(text) // 2
        kernels.put(slot, 0, ints(*text[:half]))
        rest = ints(*text[half:], 9)  # and a surplus token
        places = ints(*range(half, len(text)), 0)
        kernels.note(rest, places, ints(*[slot] * (len(text) - half), -1))
    return kernels


def test_tokens_are_read_where_they_were_written_and_unknown_ones_as_token_0() -> None:
    kernels = kernels_of({1: [3, 4, 5, V, 7], 3: [8, V - 1, 60]})
    out = torch.full((6,), 77, dtype=torch.int32, device=WHERE)
    kernels.read(out, ints(2, 3, 4, 1, 2, 0), ints(1, 1, 1, 3, 3, -1))
    assert out.tolist() == [5, 0, 7, V - 1, 0, 0]


def test_a_first_pass_ends_with_the_newest_token_and_begins_where_the_host_says() -> None:
    kernels = kernels_of({0: list(range(10, 20)), 2: [30, 31, 32]})
    params_SP = torch.zeros((NUM_SLOTS, NUM_WORDS), dtype=torch.int32, device=WHERE)
    params_SP[0, 6], params_SP[2, 6] = 4, 1  # tokens of the answers
    rows = AskedRows(ints(0, -1, 2), ints(5, 0, 3), ints(6, 0, 2), ints(3, 0, 1))
    newest_R, out = ints(0, 0, 0), empty_pass(3 * WINDOW)
    kernels.last_tokens(rows, params_SP, ints(40, 0, 41, 0), newest_R, out)
    assert newest_R.tolist()[::2] == [8, 3]
    assert out.tokens_T.view(3, -1).tolist() == [[0, 0, 16, 17, 40], [0] * WINDOW, [0, 0, 0, 32, 41]]
    assert out.positions_T.view(3, -1).tolist() == [[0, 0, 6, 7, 8], [0] * WINDOW, [0, 0, 0, 2, 3]]
    assert out.lines_T.view(3, -1).tolist() == [[-1, -1, 0, 0, 0], [-1] * WINDOW, [-1, -1, -1, 2, 2]]
    read = ints(0, 0)
    kernels.read(read, ints(8, 3), ints(0, 2))
    assert read.tolist() == [40, 41]  # written down as well


def test_the_newest_token_is_read_at_the_position_before_it_with_the_line_of_the_step_there() -> None:
    params_SP = torch.zeros((NUM_SLOTS, NUM_WORDS), dtype=torch.int32, device=WHERE)
    params_SP[0, 6], params_SP[2, 6] = 4, 1  # tokens of the answers
    # Line 6 of the step was position 7 of slot 0; line 0 position 2 of slot 2.
    rows = AskedRows(ints(0, -1, 2), ints(5, 0, 3), ints(1, 0, 2), ints(3, 0, 1))
    newest_R, shown_R, out = ints(0, 77, 0), ints(77, 77, 77), empty_pass(3)
    kernels_of({}).newest_pairs(rows, params_SP, ints(40, 0, V, 0), newest_R, shown_R, out, num_shown=7)
    assert newest_R.tolist() == [8, 77, 3] and shown_R.tolist() == [6, 0, 0]
    assert [part.tolist() for part in out] == [[40, 0, 0], [7, 0, 2], [0, -1, 2]]


def test_a_guess_is_read_behind_the_newest_token_and_none_beyond_the_longest_text() -> None:
    kernels, out = kernels_of({}), empty_pass(3)
    rows = AskedRows(ints(2, -1, 1), *(ints(0, 0, 0) for _ in range(3)))
    kernels.next_tokens(rows, ints(7, 0, MAX_LEN - 2), ints(12, 13, V), 1, out)
    assert [part.tolist() for part in out] == [[12, 0, 0], [8, 0, MAX_LEN - 1], [0, -1, 2]]
    kernels.next_tokens(rows, ints(7, 0, MAX_LEN - 2), ints(12, 13, 14), 2, out)
    assert [part.tolist() for part in out] == [[12, 0, 0], [9, 0, 0], [0, -1, -1]]


def test_pages_of_a_row_are_followed_by_its_own() -> None:
    page_table_SP = torch.arange(NUM_SLOTS * 5, dtype=torch.int32, device=WHERE).view(NUM_SLOTS, 5)
    out_RP = torch.full((3, 7), 77, dtype=torch.int32, device=WHERE)
    rows = AskedRows(ints(3, -1, 0), ints(0, 0, 0), ints(0, 0, 0), ints(2, 0, 5))
    kernels_of({}).own_pages(rows, page_table_SP, out_RP, first_own=100, num_own=2)
    assert out_RP[0].tolist()[:4] == [15, 16, 100, 101]
    assert out_RP[1].tolist() == [77] * 7
    assert out_RP[2].tolist() == [0, 1, 2, 3, 4, 104, 105]
