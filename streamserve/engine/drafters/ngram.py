"""Guesses that an answer goes on as its newest tokens went on before: in itself, its prompt, what the client predicts, and if
asked for in recent answers to others.

Owns what is known of one answer's text as tokens, and where in it each pair of tokens stands. Needs no model. Torch-free.

The guess is what follows the longest earlier occurrence of the newest tokens, of equally long ones the nearest (prompt lookup
decoding, A. Saxena 2023; REST, arXiv 2311.08252, and SuffixDecoding, arXiv 2411.04975, look in more texts). Occurrences are
found as deflate finds matches (RFC 1951, section 4): by a short key, here the last two tokens, then from place to place that
has it, newest first and not for ever. As long as the tokens that come are those that were guessed, nothing is searched.

    text     | recent answers | prediction | prompt ................. | answer ............ |
    places     sorted once      pairs sorted once, in parts             a chain per pair

Three things make guesses where there is no such occurrence. An answer is expected to begin as its prediction does. Where a text
that was followed is left, it is likely to be an edit, and the answer to join the text again a few tokens later: a place there
goes before all others, and one token is enough to find it by. And a text that repeats itself is guessed to go on doing so.

Work is done when a guess is asked for, and only then: who is not asked costs a list of tokens. Each time a bounded part of the
prompt is sorted, about 16,384 tokens in less than a millisecond, and a bounded part of the answer taken in.
"""

from collections.abc import Iterator, Sequence

from streamserve.engine.drafters.chance import Chance
from streamserve.engine.drafters.drafter import NO_GUESS, Guess
from streamserve.engine.drafters.places import MAX_CANDIDATES, Places, pair_of
from streamserve.engine.drafters.recent import NO_ANSWERS, Answers, Recent
from streamserve.messages import MEDIA_BASE, GenerateRequest

MAX_MATCH = 32  # tokens: longer ones are as good
REJOIN_WITHIN = 16  # tokens behind the place where a text was left
PART = 16_384  # places of a sorted part; about so many are sorted at once
SLICE = 2_048  # tokens of the answer taken in at once
_OWN = -3  # stands before the prompt, and in it where pictures are: no token, nor one of the ends of recent answers

# What is believed of a match by its length, before any was followed. 0: no match, but a place that is expected.
_KIND_OF_LEN = (0, 1, 2, 3, *[4] * 4, *[5] * 8, *[6] * (MAX_MATCH - 15))
_PRIORS = (0.5, 0.3, 0.35, 0.5, 0.65, 0.8, 0.92)


class NgramDrafts:
    """What follows in one answer. All places are indexes of `_text`; what is below 0 there is no token."""

    def __init__(
        self,
        request: GenerateRequest,
        token_ids: Sequence[int],
        beliefs: Sequence[Chance],
        answers: Answers = NO_ANSWERS,
        recent: Recent | None = None,
    ) -> None:
        """`answers` to look in; `recent`: where this one goes when it is over."""
        predicted = len(answers.text)  # where the prediction begins
        prompt = predicted + len(request.prediction) + 1
        words = [token_id if token_id < MEDIA_BASE else _OWN for token_id in token_ids] if request.media else token_ids
        self._text = [*answers.text, *request.prediction, _OWN, *words]
        self._known = len(self._text)  # tokens that were taken in
        self._chains_from = self._known  # places from here on, those of the answer, are in chains
        self._unsorted = [*_parts(prompt + 2, self._known), *_parts(predicted + 2, prompt - 1)]  # the last is sorted next
        self._sorted: list[Places] = []  # the prediction's first, each from its end
        self._answers = answers
        self._begin = max(prompt, self._known - MAX_MATCH)
        self._salt, self._recent = request.salt, recent
        self._newest: dict[int, int] = {}  # of a pair, the last place behind it
        self._before: list[int] = []  # for each place in chains, the one before with the same pair; 0: none
        self._source = predicted if request.prediction else 0  # what stands there is expected next; 0: nothing is
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
        if min(guessed) < 0:
            return Guess(guessed[: next(i for i, token_id in enumerate(guessed) if token_id < 0)], self._chance)
        while len(guessed) < most:  # the text repeats itself
            guessed += guessed[: most - len(guessed)]
        return Guess(guessed, self._chance)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """See Drafts. Every token that comes says whether it was expected, whether or not it was computed as a guess."""

    def close(self) -> None:
        """See Drafts."""
        if self._recent is not None:
            self._recent.add(self._salt, self._text[self._begin :])

    @property
    def _chance(self) -> float:
        return self._chances[_KIND_OF_LEN[self._match]].value

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
                    if text[source] < 0:  # that text is over
                        source = 0
                else:
                    self._left, source = source, 0
            pair = pair_of(text[place - 2], text[place - 1])
            before.append(newest.get(pair, 0))
            newest[pair] = place
        self._known, self._source, self._match = stop, source, match
        self._is_searched = False
        budget = PART
        while self._unsorted and budget > 0:
            begin, end = self._unsorted.pop()
            self._sorted.append(Places(text, begin, end))
            budget -= end - begin

    def _search(self) -> None:
        """Find the source of the next guess."""
        self._is_searched = True
        text = self._text
        end = len(text)
        best, longest = 0, 1
        for place in self._candidates(pair_of(text[-2], text[-1])):
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
        for places in self._sorted:
            yield from places.newest(pair)
        if self._answers.places is not None:
            yield from self._answers.places.newest(pair)

    def _rejoined(self) -> tuple[int, int]:
        """The nearest place behind the one where a text was left that the newest token stands before, and how many match."""
        text, newest = self._text, self._text[-1]
        return next(((place, 1) for place in self._near() if text[place - 1] == newest), (0, 0))

    def _near(self) -> Iterator[int]:
        """Places behind the one where a text was left, as far as that goes."""
        left, text = self._left, self._text
        if left:
            for place in range(left + 1, min(left + 1 + REJOIN_WITHIN, len(text))):
                if text[place] < 0:
                    return
                yield place


def _parts(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Places from `begin` to before `end`, in parts."""
    return ((start, min(start + PART, end)) for start in range(begin, end, PART))


class NgramDrafter:
    """Drafter: see there. What is believed of matches is learnt over all answers."""

    num_wanted = 0

    def __init__(self, max_drafts: int, *, is_shared: bool = False) -> None:
        """`is_shared`: guesses are also looked up in recent answers to requests of the same salt."""
        self.max_drafts = max_drafts
        self._recent = Recent() if is_shared else None
        self._beliefs = [Chance(prior, weight=16.0, memory=512.0) for prior in _PRIORS]

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> NgramDrafts:
        """See Drafter."""
        recent = self._recent
        answers = NO_ANSWERS if recent is None else recent.of(request.salt)
        return NgramDrafts(request, token_ids, self._beliefs, answers, recent)
