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


class Recent:
    """All salts' answers."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, deque[Sequence[int]]] = OrderedDict()  # by salt, the one used last at the end
        self._texts: dict[str, Answers] = {}  # those that were made since their salt's last answer

    def of(self, salt: str) -> Answers:
        """A salt's answers, the newest last."""
        if salt not in self._kept:
            return NO_ANSWERS
        self._kept.move_to_end(salt)
        if salt not in self._texts:
            self._texts[salt] = Answers(self._kept[salt])
        return self._texts[salt]

    def add(self, salt: str, token_ids: Sequence[int]) -> None:
        """An answer is over: these are its tokens, and some before it. Of a very long one the first are kept."""
        if len(token_ids) < LEAST_TOKENS:
            return
        kept = self._kept.setdefault(salt, deque())
        kept.append(token_ids[: MAX_TOKENS - 1])
        while sum(len(answer) + 1 for answer in kept) > MAX_TOKENS:
            kept.popleft()
        self._texts.pop(salt, None)
        self._kept.move_to_end(salt)
        if len(self._kept) > MAX_SALTS:
            oldest, _ = self._kept.popitem(last=False)
            self._texts.pop(oldest, None)
