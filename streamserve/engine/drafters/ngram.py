"""Guesses that an answer goes on as its newest tokens went on before: in itself, in its prompt, or in what the client predicts.

Owns what is known of one answer's text as tokens, and where in it each pair of tokens stands. Needs no model. Torch-free.

The guess is what follows the longest earlier occurrence of the newest tokens, of equally long ones the nearest (prompt lookup
decoding, A. Saxena 2023; REST, arXiv 2311.08252, and SuffixDecoding, arXiv 2411.04975, look in more texts). Occurrences are
found as deflate finds matches (RFC 1951, section 4): by a short key, here the last two tokens, then from place to place that
has it, newest first and not for ever. As long as the tokens that come are those that were guessed, nothing is searched.

    text     | prediction | prompt ................. | answer ............ |
    places     pairs sorted once, in parts              a chain per pair

Three things make guesses where there is no such occurrence. An answer is expected to begin as its prediction does. Where a text
that was followed is left, it is likely to be an edit, and the answer to join the text again a few tokens later: a place there
goes before all others, and one token is enough to find it by. And a text that repeats itself is guessed to go on doing so.

Work is done when a guess is asked for, and only then: who is not asked costs a list of tokens. Each time a bounded part of the
prompt is sorted, about 16,384 tokens in less than a millisecond, and a bounded part of the answer taken in.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streamserve.engine.drafters.chance import Chance
from streamserve.engine.drafters.drafter import NO_GUESS, Guess
from streamserve.messages import GenerateRequest

MAX_MATCH = 32  # tokens: longer ones are as good
MAX_CANDIDATES = 32  # places looked at in each part of the text
REJOIN_WITHIN = 16  # tokens behind the place where a text was left
PART = 16_384  # places of a sorted part; about so many are sorted at once
SLICE = 2_048  # tokens of the answer taken in at once
_BEGIN, _BETWEEN = -1, -2  # stand before the prediction and before the prompt: no tokens, and never the same as each other
_TOKEN_BITS = 20  # of an id; vocabularies have less than a million
_PLACE_BITS = 63 - 2 * _TOKEN_BITS
MAX_PLACE = 1 << _PLACE_BITS

# What is believed of a match by its length, before any was followed. 0: no match, but a place that is expected.
_KIND_OF_LEN = (0, 1, 2, 3, *[4] * 4, *[5] * 8, *[6] * (MAX_MATCH - 15))
_PRIORS = (0.5, 0.3, 0.35, 0.5, 0.65, 0.8, 0.92)


class _Part:
    """Places of a text that is known at once, by the two tokens before them: one sorted array of (pair, place)."""

    def __init__(self, text: Sequence[int], begin: int, end: int) -> None:
        """Of the places from `begin` on, before which there are two tokens, to before `end`."""
        tokens = np.fromiter(text[begin - 2 : end - 1], np.int64, end - begin + 1)
        pairs = (tokens[:-1] << _TOKEN_BITS | tokens[1:]) << _PLACE_BITS
        self._sorted: NDArray[np.int64] = np.sort(pairs | np.arange(begin, end))

    def newest(self, pair: int) -> Iterator[int]:
        """The last places behind such a pair, last first."""
        end = int(self._sorted.searchsorted(pair << _PLACE_BITS | (MAX_PLACE - 1), "right"))
        for entry in reversed(self._sorted[max(0, end - MAX_CANDIDATES) : end].tolist()):
            if entry >> _PLACE_BITS != pair:
                return
            yield entry & (MAX_PLACE - 1)


class NgramDrafts:
    """What follows in one answer. All places are indexes of `_text`."""

    def __init__(self, request: GenerateRequest, token_ids: Sequence[int], beliefs: Sequence[Chance]) -> None:
        self._text = [_BEGIN, *request.prediction, _BETWEEN, *token_ids]
        self._prompt = prompt = len(request.prediction) + 2  # where that begins
        self._known = len(self._text)  # tokens that were taken in
        self._chains_from = self._known  # places from here on are in chains
        self._unsorted = [*_parts(prompt + 2, self._known), *_parts(3, prompt - 1)]  # the last is sorted next
        self._parts: list[_Part] = []  # the prediction's first, each from its end
        self._newest: dict[int, int] = {}  # of a pair, the last place behind it
        self._before: list[int] = []  # for each place in chains, the one before with the same pair; 0: none
        self._source = 1 if request.prediction else 0  # what stands there is expected next; 0: nothing is
        self._match = 0  # tokens before the source that are the newest ones; at most MAX_MATCH
        self._left = 0  # where the text that was followed was left
        self._is_searched = False
        self._chances = [Chance(belief) for belief in beliefs]

    def grew(self, token_ids: Sequence[int]) -> None:
        """See Drafts."""
        self._text += token_ids

    def offered(self, token_ids: Sequence[int]) -> None:
        """See Drafts. The runner has no drafter where this one guesses."""
        raise AssertionError("nobody offers guesses beside an n-gram drafter")

    def guess(self, most: int) -> Guess:
        """See Drafts."""
        if self._known < len(self._text) or self._unsorted:
            self._take_in()
            if self._known < len(self._text):
                return NO_GUESS  # the rest when asked again
        if not self._source and not self._is_searched:
            self._search()
        source, text = self._source, self._text
        if not source:
            return NO_GUESS
        guessed = text[source : source + most]
        if _BETWEEN in guessed:
            del guessed[guessed.index(_BETWEEN) :]
        elif len(guessed) < most:
            period = len(text) - source
            while len(guessed) < most:
                guessed += guessed[-period:][: most - len(guessed)]
        return Guess(guessed, self._chances[_KIND_OF_LEN[self._match]].value)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """See Drafts. Every token that comes says whether it was expected, whether or not it was computed as a guess."""

    def close(self) -> None:
        """See Drafts."""

    def _take_in(self) -> None:
        """Follow the source along the tokens that came, and note their places."""
        text, chances, newest, before = self._text, self._chances, self._newest, self._before
        source, match = self._source, self._match
        stop = min(len(text), self._known + SLICE)
        for place in range(self._known, stop):
            token_id = text[place]
            if source:
                is_right = text[source] == token_id
                chances[_KIND_OF_LEN[match]].saw(is_right)
                if is_right:
                    source += 1
                    match = min(match + 1, MAX_MATCH)
                    if text[source] == _BETWEEN:  # the prediction is over
                        source = 0
                else:
                    self._left, source = source, 0
            pair = text[place - 2] << _TOKEN_BITS | text[place - 1]
            before.append(newest.get(pair, 0))
            newest[pair] = place
        self._known, self._source, self._match = stop, source, match
        self._is_searched = False
        budget = PART
        while self._unsorted and budget > 0:
            begin, end = self._unsorted.pop()
            self._parts.append(_Part(text, begin, end))
            budget -= end - begin

    def _search(self) -> None:
        """Find the source of the next guess."""
        self._is_searched = True
        text = self._text
        end = len(text)
        best, longest = 0, 1
        for place in self._candidates(text[-2] << _TOKEN_BITS | text[-1]):
            if longest > 1 and text[place - longest - 1] != text[end - longest - 1]:
                continue  # not longer
            match = 2
            while match < MAX_MATCH and text[place - 1 - match] == text[end - 1 - match]:
                match += 1
            if match > longest:
                best, longest = place, match
                if match == MAX_MATCH:
                    break
        if not best:
            best, longest = self._rejoined()
        self._source, self._match = best, longest
        if best:
            self._left = 0

    def _candidates(self, pair: int) -> Iterator[int]:
        """Places behind the pair that ends the text, the likelier of equal ones first."""
        text, first, second = self._text, self._text[-2], self._text[-1]
        for place in self._near():
            if text[place - 1] == second and text[place - 2] == first:
                yield place
        place, most = self._newest.get(pair, 0), MAX_CANDIDATES
        while place and most:
            yield place
            place, most = self._before[place - self._chains_from], most - 1
        for part in self._parts:
            yield from part.newest(pair)

    def _rejoined(self) -> tuple[int, int]:
        """The nearest place behind the one where a text was left that the newest token stands before, and how many match."""
        text, newest = self._text, self._text[-1]
        return next(((place, 1) for place in self._near() if text[place - 1] == newest), (0, 0))

    def _near(self) -> range:
        """Places behind the one where a text was left, as far as that goes."""
        left = self._left
        end = self._prompt - 1 if left < self._prompt else len(self._text)
        return range(left + 1, min(left + 1 + REJOIN_WITHIN, end)) if left else range(0)


def _parts(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Places from `begin` to before `end`, in parts."""
    return ((start, min(start + PART, end)) for start in range(begin, end, PART))


class NgramDrafter:
    """Drafter: see there. What is believed of matches is learnt over all answers."""

    num_wanted = 0

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._beliefs = [Chance(prior, weight=16.0, memory=512.0) for prior in _PRIORS]

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> NgramDrafts:
        """See Drafter."""
        return NgramDrafts(request, token_ids, self._beliefs)
