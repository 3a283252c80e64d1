"""The text around the turns of a chat, taken out of a model's own chat template.

A template writes whole conversations; a program of this language writes one piece after the other. So the template is rendered
with a private letter in place of each turn's content, and what stands between two letters is what closes one turn and opens the
next. What a program writes is then, token for token, the prompt that /v1/chat/completions makes of the same turns.

Owns what was found so far, per template. Knows no server and no program.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.lang.templates import PLAIN, TEMPLATES
from streamserve.text.template import ChatTemplate

ASSISTANT = "assistant"
PLACE = "\U0010f8fe"  # stands for a picture in a prompt's text, where the model has no marker of its own
MAX_KNOWN = 4096  # sequences of roles remembered
_FIRST_LETTER = 0xF0000  # of a private use area, as template.free_letters has it
_NEXT_ROLES = ("user", ASSISTANT, "system")


class TemplateRoles:
    """Roles of a chat template: see backend.Roles. `name` says whose template refuses what. `marker`: what the model's template
    has for a picture, if it has something; else, or where it does not write it after all, `marks_places`: PLACE does."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, marker: str | None = None, name: str = "the model"
    ) -> None:
        self._template = ChatTemplate(source, special_tokens=special_tokens)
        self._name = name
        self._has_date = "strftime_now" in source  # then nothing is remembered: it would be yesterday's
        self._known: dict[tuple[str, tuple[str, ...], str], str] = {}
        self.marks_places = marker is None or not self._template.writes(marker)
        if marker is None or self.marks_places:  # the server puts a letter in the place of the picture too
            self.image = self._image({"type": "text", "text": PLACE}, PLACE)
        else:
            self.image = self._image({"type": "image"}, marker)

    def begin(self, before: tuple[str, ...], role: str, *, is_written: bool = False) -> str:
        """See backend.Roles. An assistant's turn opens as one does that the model goes on with, which may begin a thought; with
        `is_written` as one does that is said already."""
        if role == ASSISTANT and is_written:
            return self._once("written", before, role, self._begin_written)
        return self._once("begin", before, role, self._begin)

    def end(self, before: tuple[str, ...], role: str) -> str:
        """See backend.Roles."""
        return self._once("end", before, role, self._end)

    def _once(self, what: str, before: tuple[str, ...], role: str, find: Callable[[tuple[str, ...], str], str]) -> str:
        key = (what, before, role)
        found = self._known.get(key)
        if found is None:
            found = find(before, role)
            if not self._has_date:
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known[key] = found
        return found

    def _begin(self, before: tuple[str, ...], role: str) -> str:
        if role == ASSISTANT:
            return self._open(before, self._behind(before, opens_answer=True))
        return self._begin_written(before, role)

    def _begin_written(self, before: tuple[str, ...], role: str) -> str:
        """As it stands in what was said before: with another turn behind it, where that is allowed. Some templates write a
        system's turn, or an assistant's without its thought, only then."""
        if role != "user":
            try:
                return self._open(before, self._behind(before, role, later=("user",)))
            except InvalidRequest:
                pass
        return self._open(before, self._behind(before, role))

    def _open(self, before: tuple[str, ...], behind: str) -> str:
        closed = self.end(before[:-1], before[-1]) if before else ""
        return behind[len(_common((closed, behind))) :]

    def _end(self, before: tuple[str, ...], role: str) -> str:
        """What stands behind the turn whatever comes next."""
        roles = (*before, role)
        ways = [partial(self._behind, roles), *(partial(self._behind, roles, after) for after in _NEXT_ROLES)]
        if role != ASSISTANT:
            ways.insert(1, partial(self._behind, roles, opens_answer=True))
        found: list[str] = []
        refusal: InvalidRequest | None = None
        for way in ways:
            try:
                found.append(way())
            except InvalidRequest as error:
                refusal = refusal or error
        if not found:
            assert refusal is not None
            raise refusal
        return _common(found)

    def _behind(
        self, before: Sequence[str], role: str | None = None, *, opens_answer: bool = False, later: tuple[str, ...] = ()
    ) -> str:
        """The text behind the last of these turns' contents: up to the content of a turn of `role`, or all."""
        roles = [*before, *([] if role is None else [role])]
        letters = [chr(_FIRST_LETTER + place) for place in range(len(roles) + len(later))]
        messages = [{"role": one, "content": letter} for one, letter in zip((*roles, *later), letters, strict=True)]
        try:
            text = self._template.render(messages, add_generation_prompt=opens_answer)
        except InvalidRequest as error:
            why = error.__cause__ or error
            raise self._refused((*roles, *later), str(why)) from None
        start = text.rfind(letters[len(before) - 1]) + 1 if before else 0
        end = len(text) if role is None else text.find(letters[len(before)], start)
        if end < 0 or (before and not start):
            raise self._refused(roles, "it leaves out what one of them says")
        found = text[start:end]
        if not set(letters).isdisjoint(found):
            # Some templates write the system's turn into the user's last turn, wherever that is. Here it stays where it was.
            if before and before[0] == "system" and len(before) > 1:
                return self._behind(before[1:], role, opens_answer=opens_answer, later=later)
            raise self._refused(roles, "it writes them in another order")
        return found

    def _refused(self, roles: Sequence[str], why: str) -> InvalidRequest:
        turns = f"turns of {', '.join(roles)}" if roles else "a chat without turns"
        return InvalidRequest(f"the chat template of {self._name} refuses {turns}: {why}", param="messages")

    def _image(self, part: dict[str, str], marker: str) -> str:
        """What the template writes for a picture in front of a text, with what stands between them beside the marker."""
        letter = chr(_FIRST_LETTER)
        text = {"type": "text", "text": letter}
        given: list[list[dict[str, str]]] = [[text], [part, text]]
        try:
            plain, shown = (
                self._template.render([{"role": "user", "content": parts}], add_generation_prompt=False).partition(letter)
                for parts in given
            )
        except InvalidRequest:
            return marker
        start = len(plain[0])
        is_added = shown[0].startswith(plain[0]) and shown[2] == plain[2] and marker in shown[0][start:]
        return shown[0][start:] if is_added else marker


def _common(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    return next((first[:at] for at, letter in enumerate(first) if letter != last[at]), first)


def roles_of(chat_template: Mapping[str, Any] | str | None, *, name: str = "the model") -> TemplateRoles:
    """Roles of what a server shows of its template, of a name among TEMPLATES, of a template's text; of nothing, plain ones."""
    if isinstance(chat_template, Mapping):
        tokens, marker = chat_template.get("special_tokens"), chat_template.get("image_marker")
        return TemplateRoles(chat_template["source"], special_tokens=tokens, marker=marker, name=name)
    if chat_template is None:
        return TemplateRoles(PLAIN, name=name)
    if chat_template in TEMPLATES:
        return TemplateRoles(TEMPLATES[chat_template], name=chat_template)
    if "{" not in chat_template:
        raise InvalidRequest(
            f"chat_template is {chat_template[:200]!r}; allowed is a template's text, or one of {', '.join(TEMPLATES)}",
            param="chat_template",
        )
    return TemplateRoles(chat_template, name=name)
