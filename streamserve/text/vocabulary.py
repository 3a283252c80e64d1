"""Whether two models have the same tokens, so that one can guess for the other. Owns nothing."""

from pathlib import Path

from streamserve.errors import CheckpointError
from streamserve.text.tokenizer import Tokenizer

MOST_OTHERS = 0.01  # share of tokens: versions of a family differ in control tokens, which makes guesses hardly worse


def refuse_other_tokens(ours: Tokenizer, theirs: Tokenizer, *, of: Path) -> None:
    """Raise CheckpointError when more than a few tokens of the model in `of` stand for something else here."""
    count = min(ours.vocab_size, theirs.vocab_size)
    others = [id for id in range(count) if ours.token_bytes(id) != theirs.token_bytes(id)]
    if len(others) > MOST_OTHERS * count:
        first = others[0]
        raise CheckpointError(
            f"{of} has other tokens than the model served: {len(others)} of {count} differ, the first is {first}, "
            f"{theirs.id_to_text(first)!r} there and {ours.id_to_text(first)!r} here; a model can guess only for one like it"
        )
