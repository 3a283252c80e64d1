"""Pictures in a prompt's text: what stands for one while a template renders, and the slots that its places become.

A slot is the id -(i + 1): a place of the request's picture i, counted from 0. Owns how markers and letters become slots. Knows no
template, no pixels, no HTTP.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.messages import Layout
from streamserve.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
# Types of content parts in whose place a picture, a video or a sound stands; there is nothing else in them. What is said here of
# pictures holds for all.
PICTURES = ("image", "audio")


def is_picture(part: Any) -> bool:
    """Whether a content part stands for a picture."""
    return isinstance(part, Mapping) and part.get("type") in PICTURES


def num_pictures(messages: Sequence[Message]) -> int:
    """How many pictures stand in a conversation."""
    contents = (message.get("content") for message in messages)
    return sum(is_picture(part) for content in contents if isinstance(content, list) for part in content)


def lettered(messages: Sequence[Message], letters: Sequence[str]) -> list[Message]:
    """The conversation with a letter, as a text part, in place of each picture: for templates that show texts only. A message's
    one picture comes before its texts where it stands behind them: a small model reads a question better that it knows the
    picture of, and so do LLaVA's templates."""
    waiting = iter(letters)

    def parts(content: list[Any]) -> list[Any]:
        if content and is_picture(content[-1]) and sum(map(is_picture, content)) == 1:
            content = [content[-1], *content[:-1]]
        return [{"type": "text", "text": next(waiting)} if is_picture(part) else part for part in content]

    return [_with_parts(message, parts) for message in messages]


def seamed(messages: Sequence[Message], pattern: re.Pattern[str], letter: Callable[[], str]) -> tuple[list[Message], str]:
    """The conversation with a letter between texts of one message that a template may put side by side though a picture stands
    between them, where they would spell a control token then; and the letter, "" where there is none."""
    seam = ""

    def parts(content: list[Any]) -> list[Any]:
        nonlocal seam
        texts = [part["text"].strip() for part in content if not is_picture(part)]
        if len(texts) < 2 or len(pattern.findall("".join(texts))) == sum(len(pattern.findall(text)) for text in texts):
            return content
        seam = seam or letter()
        return [part if is_picture(part) else {**part, "text": seam + part["text"]} for part in content]

    return [_with_parts(message, parts) for message in messages], seam


def _with_parts(message: Message, change: Callable[[list[Any]], list[Any]]) -> Message:
    content = message.get("content")
    return {**message, "content": change(content)} if isinstance(content, list) else message


def token_id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a model's image token. CheckpointError when the tokenizer has no such token."""
    ids = tokenizer.encode(token, add_special_tokens=False, continues=True)
    if len(ids) != 1:
        raise CheckpointError(f"the model's image token {token!r} is no token of its tokenizer, but {len(ids)} of them")
    return ids[0]


def filled(text: str, marker: str, pictures: Sequence[Layout]) -> str:
    """The text with each picture's own in place of its marker. Raises InvalidRequest unless there are as many markers."""
    first, *rest = text.split(marker)
    check_shown(len(rest), pictures)
    return first + "".join([picture.text + piece for picture, piece in zip(pictures, rest, strict=True)])


def check_shown(num_shown: int, pictures: Sequence[Layout]) -> None:
    """Raises InvalidRequest unless a template has shown every picture, once."""
    if num_shown != len(pictures):
        raise InvalidRequest(f"the chat template shows {num_shown} of {len(pictures)} pictures", param="messages")


def slots(picture: int, layout: Layout) -> list[int]:
    """The slots of a picture whose places stand alone."""
    return [-(picture + 1)] * layout.num_tokens


class Slots:
    """Gives the image tokens of a text to its pictures, in order. `order`: the pictures as they stand in the text."""

    def __init__(self, token_id: int, pictures: Sequence[Layout], order: Sequence[int] | None = None) -> None:
        self._token_id = token_id
        places = range(len(pictures)) if order is None else order
        self._left: Iterator[int] = iter([slot for picture in places for slot in slots(picture, pictures[picture])])

    def take(self, ids: Sequence[int]) -> list[int]:
        """The next ids of the text, image tokens replaced by slots. Raises InvalidRequest for one that no picture has."""
        token_id, left = self._token_id, self._left
        found = [next(left, token_id) if id == token_id else id for id in ids]
        if token_id in found:
            raise InvalidRequest("the prompt holds the model's image token where no picture stands", param="messages")
        return found

    @property
    def is_spent(self) -> bool:
        """Whether every place has its slot. Asked once, at the end."""
        return next(self._left, None) is None
