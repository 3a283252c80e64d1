"""A server's tokenizer under the names of transformers', for scripts that ask `get_tokenizer()` for one.

Owns these names. The server encodes and decodes: nothing is loaded here, and a text's ids are those that the model would see.
Knows no transport: a function makes the calls. All methods wait, as plain code does.
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from streamserve.lang import loops

Call = Callable[[str, str, Any], Coroutine[Any, Any, Any]]  # of the server's API: a method, a path, a body


class Encoding(dict[str, Any]):
    """`input_ids` and `attention_mask`, as entries and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ServerTokenizer:
    """The few methods of a transformers tokenizer that scripts call beside a model which runs elsewhere."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> Encoding:
        """Token ids of a text, or of each of a list."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return Encoding(input_ids=ids, attention_mask=[1] * len(ids))
        rows = [self.encode(each, add_special_tokens) for each in text]
        return Encoding(input_ids=rows, attention_mask=[[1] * len(row) for row in rows])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with a begin token where the model wants one."""
        return self._tokens(prompt=text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids, of a list or an array; of one id too."""
        ids = [int(id) for id in token_ids] if isinstance(token_ids, Iterable) else [int(token_ids)]
        body = {"tokens": ids, "skip_special_tokens": skip_special_tokens}
        text: str = loops.run(self._call("POST", "/detokenize", body))["text"]
        return text

    def batch_decode(self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """The text of each."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **chat_template_kwargs: Any,
    ) -> Any:
        """What the model's template makes of a conversation: token ids, or without `tokenize` their text."""
        given = {"tools": tools, "chat_template_kwargs": chat_template_kwargs or None}
        ids = self._tokens(
            messages=list(conversation),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{name: value for name, value in given.items() if value is not None},
        )
        return ids if tokenize else self.decode(ids)

    @property
    def chat_template(self) -> str | None:
        """Its source, where the model has one."""
        return (self._facts.get("chat_template") or {}).get("source")

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a prompt, where the template knows one."""
        return self._special("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends an answer, where the template knows one."""
        return self._special("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Its id."""
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Its id; of a model whose template names none, the first of those that end an answer."""
        found = self._id_of(self.eos_token)
        return next(iter(self._facts["eos_token_ids"]), None) if found is None else found

    @property
    def vocab_size(self) -> int:
        """Ids below this may be tokens."""
        return int(self._facts["vocab_size"])

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def model_max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self._facts["max_model_len"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = loops.run(self._call("GET", "/get_model_info", None))
        return facts

    def _special(self, name: str) -> str | None:
        return ((self._facts.get("chat_template") or {}).get("special_tokens") or {}).get(name)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.encode(token, add_special_tokens=False)[0]

    def _tokens(self, **body: Any) -> list[int]:
        tokens: list[int] = loops.run(self._call("POST", "/tokenize", body))["tokens"]
        return tokens
