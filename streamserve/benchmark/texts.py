"""What made-up prompts are made of: token ids, text of so many tokens, or plain words.

Owns the making, and how long a text is thought to be. Knows no server and no workload.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Protocol

from streamserve.text.tokenizer import Tokenizer, load_tokenizer

Prompt = str | list[int]

_COMMON = """
a about above across after again air all along also always an and animal another answer any are around as ask at away
back be because been before began begin being below between big bird black blue boat body book both bottle bread bring
brother build busy but by call came can car carry change child city clear close cloud cold colour come country cover
cross cut day deep did different do does door down draw dry each early earth east eat end enough even ever every example
eye face fall family far farm fast father feel feet few field find fire first fish five fly follow food for form four
free friend from front full game garden gave get girl give go gold good got great green ground group grow had half hand
happy hard has have he head hear heat help her here high hill him his hold home horse hot hour house how hundred idea if
in is island it just keep kind king knew know land large last late learn leave left letter life light like line list
listen little live long look made make man many map mark may me mean measure men might mile milk mind money month moon
more morning most mother mountain move much music must my name near need never new next night no north not note nothing
now number of off often old on once one only open or order other our out over own page paper part pass people perhaps
piece place plan plant play point pound power press quick rain read red rest river road rock room round run said same
sand saw say school sea second see seem sentence set seven ship short should show side sing sister sit six sleep slow
small snow so some song soon sound south stand star start stay step still stone stop story street strong such sun sure
table take talk teach tell ten than that the their them then there these they thing think this those though thought
three through time to together told too took top town tree true try turn two under until up us use very voice walk want
war warm was watch water way we week well went were west what wheel when where which while white who whole why wind
winter wish with woman wood word work world would write year yellow yes yet you young your
"""
WORDS = tuple(_COMMON.split())


class Maker(Protocol):
    """Makes prompts. `says`: how, and how sure their lengths are."""

    says: str

    def random(self, rng: Random, count: int) -> Prompt:
        """A prompt of so many tokens."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text."""
        ...


class Ids:
    """Token ids out of a pool: prompts that no tokenizer changes."""

    def __init__(self, pool: Sequence[int], counter: "Maker") -> None:
        self.says = "token ids, as many as asked for"
        self._pool = pool
        self._counter = counter

    def random(self, rng: Random, count: int) -> list[int]:
        """See Maker."""
        return [self._pool[rng.randrange(len(self._pool))] for _ in range(count)]

    def count(self, text: str) -> int:
        """See Maker."""
        return self._counter.count(text)


class Tokenized:
    """Text that a tokenizer turns into so many tokens."""

    TRIES = 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.says = "text of so many tokens by the model's tokenizer"
        self._tokenizer = tokenizer
        self.ids = [id for id in range(tokenizer.vocab_size) if not tokenizer.is_special(id)]

    def random(self, rng: Random, count: int) -> str:
        """See Maker. Words first: most of a vocabulary's tokens are no text by themselves."""
        ids: list[int] = []
        text = ""
        for _ in range(self.TRIES):
            missing = count - len(ids)
            if missing > 0:
                text += "".join(" " + rng.choice(WORDS) for _ in range(missing))
            ids = self._encoded(text)
            if len(ids) == count:
                break
            ids = ids[:count]
            text = self._tokenizer.decode(ids)
            ids = self._encoded(text)
        return text

    def count(self, text: str) -> int:
        """See Maker."""
        return len(self._encoded(text))

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, allow_special=False)


class Words:
    """Plain words, where nobody knows the tokenizer: about so many tokens."""

    def __init__(self, tokens_per_word: float = 1.0, *, is_measured: bool = False) -> None:
        self._per_word = tokens_per_word
        self.says = (
            f"words of {tokens_per_word:.2f} tokens as the server counts them" if is_measured else "words, each taken for a token"
        )

    def random(self, rng: Random, count: int) -> str:
        """See Maker."""
        return " ".join(rng.choice(WORDS) for _ in range(max(1, round(count / self._per_word))))

    def count(self, text: str) -> int:
        """See Maker."""
        return round(len(text.split()) * self._per_word)


def find_tokenizer(path: str | None, model: str) -> Tokenizer | None:
    """The tokenizer that was named, or that of a model whose name is a path on this machine."""
    if path is not None:
        return load_tokenizer(Path(path))
    here = Path(model)
    return load_tokenizer(here) if here.is_absolute() and here.exists() else None
