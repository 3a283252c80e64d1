"""The text side of one model: tokenizer, chat template and sampling defaults together, as the API uses them.

Owns nothing that changes. Knows nothing of HTTP or the engine. Encoding long texts takes milliseconds: call it in a worker
thread then; all methods are safe for that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.messages import Layout
from streamserve.text.answers import Answers
from streamserve.text.detokenizer import Detokenizer
from streamserve.text.folder_source import read_generation
from streamserve.text.pictures import Slots, check_shown, filled, slots, token_id_of
from streamserve.text.template import ChatTemplate, Message, encode_chat
from streamserve.text.tokenizer import FastTokenizer, Tokenizer, read_source


@dataclass(frozen=True, slots=True)
class TextModel:
    """`template` None: the model completes text and does not chat. `defaults`: sampling fields that the model's files set."""

    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    defaults: Mapping[str, float] = field(default_factory=dict)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a completion prompt. Control tokens may be written out; a begin token that is written is not doubled."""
        ids = self.tokenizer.encode(text)
        bos_id, bos = self.tokenizer.bos_token_id, self.tokenizer.special_tokens.get("bos_token")
        is_doubled = bos is not None and text.startswith(bos) and ids[:2] == [bos_id, bos_id]
        # Only the one the tokenizer added: a text that itself begins with two keeps them.
        return ids[1:] if is_doubled else ids

    def _encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_pictured_prompt(
        self,
        text: str,
        pictures: Sequence[Layout],
        *,
        marker: str | None = None,
        token: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Ids of a completion prompt with pictures, which stand where the text has the marker, once for each; if it has none, in
        front. Raises InvalidRequest when markers and pictures are not as many."""
        encode = self.encode_prompt if add_special_tokens else self._encode_plain
        is_marked = marker is not None and marker in text
        if token is None:
            first, *rest = text.split(marker) if is_marked else ("", *[""] * (len(pictures) - 1), "\n" + text)
            check_shown(len(rest), pictures)
            ids = encode(first)
            for place, piece in enumerate(rest):
                ids += slots(place, pictures[place])
                ids += self.tokenizer.encode(piece, add_special_tokens=False, continues=True)
            return ids
        if is_marked:
            assert marker is not None
            text = filled(text, marker, pictures)
        else:
            text = "".join([picture.text for picture in pictures]) + text
        given_out = Slots(token_id_of(self.tokenizer, token), pictures)
        ids = given_out.take(encode(text))
        assert given_out.is_spent, "a picture's text has its image token once for every place"
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        answers: Answers | None = None,
        allow_control_tokens: bool = False,
        pictures: Sequence[Layout] = (),
        marker: str | None = None,
        token: str | None = None,
    ) -> list[int]:
        """Ids of a chat; see template.encode_chat."""
        if self.template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions or start the server with --chat-template FILE",
                param="messages",
            )
        return encode_chat(
            self.tokenizer,
            self.template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=kwargs,
            answers=answers,
            allow_control_tokens=allow_control_tokens,
            pictures=pictures,
            marker=marker,
            token=token,
        )

    def detokenizer(self, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for one answer to the given prompt."""
        return Detokenizer(self.tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids)


def load_text_model(path: Path, *, tokenizer_path: Path | None = None, chat_template_path: Path | None = None) -> TextModel:
    """The text side of a GGUF file or a Hugging Face folder. CheckpointError when its tokenizer is missing or unsupported.

    With `tokenizer_path` tokenizer and template come from there; what the model's own folder says of sampling and of ends
    of text holds all the same.
    """
    source = read_source(tokenizer_path or path)
    defaults, ends = source.sampling_defaults, source.eos_token_ids
    if tokenizer_path is not None and path.is_dir():
        own_defaults, own_ends = read_generation(path)
        defaults, ends = {**defaults, **own_defaults}, ends | own_ends
    templates = source.templates if chat_template_path is None else {"default": _read(chat_template_path)}
    template = None
    if "default" in templates:
        template = ChatTemplate(templates["default"], special_tokens=source.special_tokens, tool_source=templates.get("tool_use"))
    return TextModel(FastTokenizer(replace(source, eos_token_ids=ends)), template, defaults)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the chat template {path}: {error}") from error
