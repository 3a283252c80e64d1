"""Guesses that the runner's own drafter made behind a step, kept until they are asked for. Torch-free.

Owns what was offered for one answer and how often such guesses are right. Knows nothing of the network that makes them.
"""

from collections.abc import Sequence

from streamserve.engine.drafters.chance import Chance
from streamserve.engine.drafters.drafter import Guess
from streamserve.messages import GenerateRequest

_PRIOR = 0.6  # what is believed before any guess was judged


class OfferedDrafts:
    """The guesses for one answer. Where none are at hand it still says how likely the next ones are right."""

    def __init__(self, belief: Chance) -> None:
        self._offered: Sequence[int] = ()
        self._chance = Chance(belief)

    def grew(self, token_ids: Sequence[int]) -> None:
        """See Drafts. Of what was offered stays what lies behind these tokens, if all of them were offered."""
        offered = self._offered
        if not offered:
            return
        for i, token_id in enumerate(token_ids):
            if i == len(offered):
                break
            is_right = offered[i] == token_id
            self._chance.saw(is_right)
            if not is_right:
                self._offered = ()
                return
        self._offered = offered[len(token_ids) :]

    def offered(self, token_ids: Sequence[int]) -> None:
        """See Drafts."""
        self._offered = token_ids

    def guess(self, most: int) -> Guess:
        """See Drafts."""
        return Guess(self._offered[:most], self._chance.value)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """See Drafts. Every token that comes says whether it was offered, whether or not it was computed as a guess."""

    def close(self) -> None:
        """See Drafts."""


class OfferedDrafter:
    """Drafter whose guesses are made by the runner: see Drafter. Each answer's chance begins as that of all before it."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self.num_wanted = max_drafts
        self._belief = Chance(_PRIOR, weight=16.0, memory=512.0)

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> OfferedDrafts:
        """See Drafter."""
        return OfferedDrafts(self._belief)
