"""Positions of a prompt with pictures as models with M-RoPE count them: frame, row and column (Qwen2-VL, arXiv 2409.12191).

Owns that rule. A token's three numbers are one and the same; a picture's places count frames, rows and columns from the number
that its first place would have had as a token; what follows goes on behind the largest of them. Places without a grid are counted
like tokens. Torch-free.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamserve.messages import Media

Rotary = NDArray[np.int32]


def rotary_lead(media: Sequence[Media]) -> int:
    """How far numbers run ahead of places behind a prompt with these, and nowhere further: a clip's frames may lie further apart
    than they have places. 0: nowhere are they ahead."""
    shift = 0
    for span in (span for one in media for span in one.spans):
        frames, rows, columns = span.grid or (1, 1, span.num_tokens)
        shift += max(int((frames - 1) * span.frame_step), rows - 1, columns - 1) + 1 - span.num_tokens
    return max(0, shift)


def rotary_positions(num_prompt: int, media: Sequence[Media]) -> tuple[Rotary, int]:
    """[3, num_prompt], and what to add to a position behind the prompt for its number."""
    out = np.empty((3, num_prompt), np.int32)
    at = following = 0  # the next place, and its number were it a token
    for span in sorted(span for one in media for span in one.spans if span.grid is not None):
        out[:, at : span.start] = np.arange(following, following + span.start - at, dtype=np.int32)
        following += span.start - at
        assert span.grid is not None
        frames, rows, columns = span.grid
        assert frames * rows * columns == span.num_tokens
        counted = np.indices((frames, rows, columns), dtype=np.int32).reshape(3, -1)
        counted[0] = counted[0] * span.frame_step  # rounded down
        out[:, span.start : span.end] = following + counted
        following += int(counted.max()) + 1
        at = span.end
    out[:, at:] = np.arange(following, following + num_prompt - at, dtype=np.int32)
    return out, following - at
