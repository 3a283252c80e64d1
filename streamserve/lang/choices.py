"""How one of several given answers is taken, from the log-probabilities of all of them.

Owns the three methods of SGLang's language (Zheng et al. 2023, arXiv 2312.07104), under its names. Knows no server. A method of
one's own is a subclass of ChoicesSamplingMethod.

Every list has an entry per choice, in their order; what is said of a token is SGLang's triple: log-probability, token id, text.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.lang.backend import ChoicesMethod, Chosen

Entries = Sequence[Sequence[Any]]
Rows = Sequence[Entries]
Taken = tuple[int, dict[str, Any]]
MAX_TEMPERATURE = 1e-5  # of a select, which samples nothing


class ChoicesSamplingMethod(ChoicesMethod):
    """A way to choose. `requires_unconditional_logprobs`: the choices' tokens are scored without the prompt as well."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether unconditional_token_logprobs is needed; it is None where it is not."""
        return False


class _Method(ChoicesSamplingMethod):
    """One that is known here: `_take` says which, all say the same of the choices."""

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Entries],
        output_token_logprobs: Sequence[Entries],
        unconditional_token_logprobs: Sequence[Entries] | None = None,
    ) -> Chosen:
        """See ChoicesMethod."""
        taken, more = self._take(normalized_prompt_logprobs, input_token_logprobs, unconditional_token_logprobs)
        meta = {
            "normalized_prompt_logprobs": list(normalized_prompt_logprobs),
            "input_token_logprobs": list(input_token_logprobs),
            "output_token_logprobs": list(output_token_logprobs),
        }
        return Chosen(choices[taken], meta | more)

    @abstractmethod
    def _take(self, means: Sequence[float], inputs: Rows, alone: Rows | None) -> Taken:
        """The place of the choice that is taken, and what there is to say beside what all methods say."""


class TokenLengthNormalized(_Method):
    """The choice whose tokens have the highest log-probability on average."""

    def _take(self, means: Sequence[float], inputs: Rows, alone: Rows | None) -> Taken:
        return _best(means), {}


class GreedyTokenSelection(_Method):
    """The choice that greedy decoding would come to: of the first tokens the likeliest stay, of those the likeliest second ones,
    and so on. A choice that has ended goes on with its own mean, so that one that another begins with is not lost by that."""

    def _take(self, means: Sequence[float], inputs: Rows, alone: Rows | None) -> Taken:
        rows = [[_value(entry) for entry in entries] for entries in inputs]
        num_tokens = max(map(len, rows))
        padded = [row + [mean_of(entries)] * (num_tokens - len(row)) for row, entries in zip(rows, inputs, strict=True)]
        left = list(range(len(padded)))
        for place in range(num_tokens):
            best = max(padded[choice][place] for choice in left)
            left = [choice for choice in left if padded[choice][place] == best]
        return left[0], {"greedy_logprob_matrix": padded}


class UnconditionalLikelihoodNormalized(_Method):
    """The choice whose tokens the prompt makes likelier by the most, on average (Brown et al. 2020, arXiv 2005.14165, 2.4)."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """See ChoicesMethod."""
        return True

    def _take(self, means: Sequence[float], inputs: Rows, alone: Rows | None) -> Taken:
        if alone is None:
            raise InvalidRequest(
                "choices_method unconditional_likelihood_normalized needs the choices scored without the prompt, which this back "
                "end cannot do; use another method",
                param="choices_method",
            )
        gains = [
            _mean([_value(behind) - _value(bare) for behind, bare in zip(own, without, strict=True)])
            for own, without in zip(inputs, alone, strict=True)
        ]
        return _best(gains), {
            "unconditional_token_logprobs": list(alone),
            "normalized_unconditional_prompt_logprobs": gains,
        }


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()


def check_choices(choices: Sequence[str], temperature: float) -> None:
    """Raises InvalidRequest for what cannot be chosen from."""
    if temperature > MAX_TEMPERATURE:
        raise InvalidRequest(f"temperature is {temperature:g}; a select takes the best choice: allowed is 0", param="temperature")
    if not choices:
        raise InvalidRequest("choices is empty; at least 1 is needed", param="choices")
    for place, choice in enumerate(choices):
        if not choice:
            raise InvalidRequest(f"choices[{place}] is empty; it has no token whose likelihood could be seen", param="choices")


def mean_of(entries: Entries) -> float:
    """The mean log-probability of the tokens that have one: a text's first token follows nothing and has none."""
    return _mean([entry[0] for entry in entries if entry[0] is not None])


def healed(entries: Entries, prompt_ids: Sequence[int], start: int) -> list[Sequence[Any]]:
    """A choice's own tokens among those of prompt and choice together, of which `entries` begin at place `start`.

    The prompt's last token may have become another one, together with the beginning of the choice: then it is one of the choice's
    ("token healing"). Where it has not it says nothing of the choice.
    """
    same = 0
    while same < len(entries) and start + same < len(prompt_ids) and entries[same][1] == prompt_ids[start + same]:
        same += 1
    return list(entries[same:])


def _value(entry: Sequence[Any]) -> float:
    """0 for a first token, which nothing was known of."""
    return 0.0 if entry[0] is None else float(entry[0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _best(scores: Sequence[float]) -> int:
    """The first of the highest."""
    return max(range(len(scores)), key=lambda place: scores[place])
