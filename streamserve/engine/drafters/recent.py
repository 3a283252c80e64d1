"""Recent answers, for guesses in others that are like them. Torch-free.

Owns, for each salt, the tokens of its last answers: requests of different salts never hear of each other, as in the prefix
cache. Bounded in tokens and in salts; what was used least recently goes first.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

from streamserve.engine.drafters.places import Places

MAX_TOKENS = 16_384  # of a salt's answers
MAX_SALTS = 64
LEAST_TOKENS = 4  # of an answer that is kept
BEGIN, END = -1, -2  # stand before all answers and behind each: no tokens


class Answers:
    """Recent answers of one salt as one text, and its places. Not changed any more."""

    def __init__(self, answers: Sequence[Sequence[int]] = ()) -> None:
        self.text = [BEGIN]
        for answer in answers:
            self.text += answer
            self.text.append(END)
        self.places = Places(self.text, 3, len(self.text)) if answers else None


NO_ANSWERS = Answers()


class _Kept:
    """One salt's answers, and their text if it was made since the last of them."""

    __slots__ = ("answers", "text")

    def __init__(self) -> None:
        self.answers: deque[Sequence[int]] = deque()
        self.text: Answers | None = None


class Recent:
    """All salts' answers."""

    def __init__(self) -> None:
        self._salts: OrderedDict[str, _Kept] = OrderedDict()  # the one used last at the end

    def of(self, salt: str) -> Answers:
        """A salt's answers, the newest last."""
        kept = self._salts.get(salt)
        if kept is None:
            return NO_ANSWERS
        self._salts.move_to_end(salt)
        if kept.text is None:
            kept.text = Answers(kept.answers)
        return kept.text

    def add(self, salt: str, token_ids: Sequence[int]) -> None:
        """An answer is over: these are its tokens, and some before it. Of a very long one the first are kept."""
        if len(token_ids) < LEAST_TOKENS:
            return
        kept = self._salts.setdefault(salt, _Kept())
        self._salts.move_to_end(salt)
        kept.text = None
        kept.answers.append(token_ids[: MAX_TOKENS - 1])
        while sum(len(answer) + 1 for answer in kept.answers) > MAX_TOKENS:
            kept.answers.popleft()
        if len(self._salts) > MAX_SALTS:
            self._salts.popitem(last=False)
