"""What a model's family does with a picture, video or sound before its encoder takes it: sizes, tiles, arrays, and places in the
prompt.

Owns the types that families share, and finds a family's file by its model_type. Knows no tensors, no tokenizer, no HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from streamserve.media.picture import Picture
from streamserve.media.sound import Sound
from streamserve.media.video import Clip
from streamserve.messages import AUDIO, IMAGE, VIDEO, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A picture, video or sound as the model takes it. `key`, `inputs`, `cost` and `kind` as in messages.Media."""

    key: bytes
    inputs: Mapping[str, Any]
    layout: Layout
    cost: int
    kind: str = IMAGE


class Family(Protocol):
    """How one model takes pictures, videos or sounds: it has the methods for those that it takes. They may run in several threads
    at once.

    `marker`: what the model's chat template writes for one, to be replaced by Layout.text; None: the template knows of none.
    `token`: the text of the token that Layout.text has once for every place; None: there is no such token.
    """

    @property
    def marker(self) -> str | None: ...
    @property
    def token(self) -> str | None: ...


@runtime_checkable
class PictureFamily(Protocol):
    """A family that takes pictures."""

    def prepare(self, picture: Picture) -> Prepared:
        """Arrays for the encoder. Takes milliseconds: call it in a worker thread. Raises InvalidRequest for a picture that the
        model cannot take, whatever its bytes."""
        ...


@runtime_checkable
class ClipFamily(Protocol):
    """A family that takes videos as well. A template shows one as it shows a picture."""

    def prepare_clip(self, clip: Clip) -> Prepared:
        """Decodes the clip: takes up to some ten seconds, in a worker thread. Raises InvalidRequest."""
        ...


@runtime_checkable
class SoundFamily(Protocol):
    """A family that takes sounds. `rate`: samples in a second that it hears at; `max_seconds`: the longest that it hears."""

    rate: int
    max_seconds: float

    def prepare_sound(self, sound: Sound) -> Prepared:
        """Takes milliseconds, in a worker thread. Raises InvalidRequest."""
        ...


def kinds_of(family: Family) -> frozenset[str]:
    """What a model takes."""
    takes = {IMAGE: PictureFamily, VIDEO: ClipFamily, AUDIO: SoundFamily}
    return frozenset(kind for kind, protocol in takes.items() if isinstance(family, protocol))


class MakeFamily(Protocol):
    """A file in families/ has a class Family that is made so: from the folder of the checkpoint and its config.json."""

    def __call__(self, folder: Path, config: Mapping[str, Any]) -> Family: ...


def key_of(source: Picture | Clip | Sound, settings: str) -> bytes:
    """A key for what was prepared with these settings."""
    return sha256(source.digest + settings.encode()).digest()


def encoder_cost(num_patches: int, vision: Mapping[str, int], text: Mapping[str, int]) -> int:
    """How many tokens of the language model take as much arithmetic as so many patches of the encoder. Both by their
    num_hidden_layers, hidden_size and intermediate_size."""

    def weights(config: Mapping[str, int]) -> int:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        return config["num_hidden_layers"] * (4 * hidden * hidden + 3 * hidden * inner)

    return max(1, round(num_patches * weights(vision) / weights(text)))
