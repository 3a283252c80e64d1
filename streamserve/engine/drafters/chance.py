"""How likely a guess is right, learnt from what came. Torch-free.

A chance begins as what is believed of its kind and moves to what was seen: a Beta prior whose counts fade, so that an answer
that changes its manner is followed. Knows nothing of tokens.
"""


class Chance:
    """`prior`: what is believed before anything was seen: a number, or the chance of the same thing in all answers, which then
    learns with this one. It weighs as much as `weight` things seen; of those about the last `memory` count."""

    __slots__ = ("_keep", "_prior", "_right", "_seen", "_weight")

    def __init__(self, prior: "float | Chance", *, weight: float = 4.0, memory: float = 32.0) -> None:
        self._prior = prior
        self._weight = weight
        self._keep = 1.0 - 1.0 / memory
        self._right = 0.0
        self._seen = 0.0

    @property
    def value(self) -> float:
        """0 to 1, and neither of them."""
        prior = self._prior
        believed = prior if isinstance(prior, float) else prior.value
        return (self._right + self._weight * believed) / (self._seen + self._weight)

    def saw(self, is_right: bool) -> None:
        """A guess of this kind could be judged: all guesses before it were right, and the token of its place has come."""
        self._right = self._right * self._keep + is_right
        self._seen = self._seen * self._keep + 1.0
        if isinstance(self._prior, Chance):
            self._prior.saw(is_right)
