"""Structural tags as grammars: free text with constrained parts in it, as SGLang and XGrammar describe them.

Owns the reading of both forms: {"structures", "triggers"}, and {"format": {...}} with typed nodes. Refuses what it does not know
by its path. Compiles nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.text.gbnf import is_gbnf, lark_of_gbnf
from streamserve.text.lark import ANY_TEXT, Grammar, between_slashes, json_value, literal, marked, regex_of, repeated, without
from streamserve.text.pattern import fault_of
from streamserve.text.schema import prepare

MAX_TAGS = 1_000
MAX_DEPTH = 16


def structural_tag(value: Any, param: str, options: Mapping[str, Any], control: Mapping[str, int] | None = None) -> Grammar:
    """The grammar of one description, which stands at `param` in the request. `options` space the JSON in it (structure.spacing);
    `control` has the ids of control tokens by their texts, which free text does not match and tags may hold."""
    if not isinstance(value, Mapping):
        raise _refusal(param, f"is {value!r:.80}; it must be an object")
    builder = _Builder(options, control or {})
    if "format" in value:
        _check_keys(value, ("type", "format"), param)
        expression, _ = builder.node(value["format"], f"{param}.format", None, 0)
    else:
        _check_keys(value, ("type", "structures", "triggers"), param)
        expression = builder.structures(value, param)
    return Grammar(expression, tuple(builder.rules))


class _Builder:
    """Gathers rules; every name is made here."""

    def __init__(self, options: Mapping[str, Any], control: Mapping[str, int]) -> None:
        self._options = options
        self._control = control
        self._num_tags = 0
        self.rules: list[str] = []

    # {"structures": [{"begin", "schema", "end"}], "triggers": [...]}

    def structures(self, value: Mapping[str, Any], path: str) -> str:
        """The older form as an expression."""
        tags = []
        for n, given in enumerate(_list(value.get("structures"), f"{path}.structures")):
            here = f"{path}.structures[{n}]"
            _check_keys(given, ("begin", "schema", "end"), here)
            content = {"type": "json_schema", "json_schema": given.get("schema", {})}
            tags.append({"begin": given.get("begin"), "content": content, "end": given.get("end")})
            _text(given.get("begin"), f"{here}.begin")
            _text(given.get("end"), f"{here}.end", may_be_empty=True)
        paths = [f"{path}.structures[{n}].schema" for n in range(len(tags))]
        triggers = _list(value.get("triggers"), f"{path}.triggers")
        return self._triggered(triggers, tags, f"{path}.triggers", lambda n: paths[n], "structures")

    def _triggered(
        self,
        triggers: Sequence[Any],
        tags: Sequence[Mapping[str, Any]],
        path: str,
        schema_path: Callable[[int], str],
        where: str,
        *,
        at_least_one: bool = False,
        stops_after_first: bool = False,
    ) -> str:
        """Free text in which each trigger begins one of the tags that begin with it."""
        texts = [_text(trigger, f"{path}[{n}]") for n, trigger in enumerate(triggers)]
        branches: dict[str, list[str]] = {text: [] for text in texts}
        for n, tag in enumerate(tags):
            begin = tag["begin"]
            trigger = min((text for text in texts if begin.startswith(text)), key=len, default=None)
            if trigger is None:
                raise _refusal(path, f"holds no beginning of {begin!r:.80}, with which {where}[{n}] begins")
            rest = self._marked(begin[len(trigger) :])
            content, is_closed = self.node(tag["content"], schema_path(n), tag["end"], 1)
            branches[trigger].append(f"{rest} {content}" + ("" if is_closed else f" {self._marked(tag['end'])}"))
        heads = []
        for text, bodies in branches.items():
            if not bodies:
                raise _refusal(path, f"holds {text!r:.80}, with which none of {where} begins")
            if text in self._control:
                part = self._rule(ANY_TEXT)
                heads.append(f"{part} <[{self._control[text]}]> ({' | '.join(bodies)})")
            else:
                head = self._rule(f"/(?s:.*){regex_of(text)}/", is_lazy=True)
                heads.append(f"{head} ({' | '.join(bodies)})")
        plain = [text for text in texts if text not in self._control]
        tail = self._terminal(without(plain) if plain else ANY_TEXT)
        times = ("" if at_least_one else "?") if stops_after_first else ("+" if at_least_one else "*")
        return f"({' | '.join(heads)}){times}" + ("" if stops_after_first and at_least_one else f" {tail}")

    # {"format": {"type": ..., ...}}

    def node(self, value: Any, path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        """A node as an expression, and whether that holds the text `closing` too, which follows it."""
        if depth > MAX_DEPTH:
            raise _refusal(path, f"is nested over {MAX_DEPTH} deep")
        self._num_tags += 1
        if self._num_tags > MAX_TAGS:
            raise _refusal(path, f"is the {self._num_tags}th part; at most {MAX_TAGS} are allowed")
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            raise _refusal(path, f"is {value!r:.80}; it must be an object with a type")
        make = _NODES.get(value["type"])
        if make is None:
            raise _refusal(f"{path}.type", f"is {value['type']!r:.80}; allowed are {', '.join(_NODES)}")
        keys, build = make
        _check_keys(value, ("type", *keys), path)
        return build(self, value, path, closing, depth)

    def const_string(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        return self._marked(_text(value.get("value"), f"{path}.value")), False

    def json_schema(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        if value.get("style", "json") != "json":
            raise _refusal(f"{path}.style", f'is {value["style"]!r:.80}; allowed is "json"')
        place = path if path.endswith(".schema") else f"{path}.json_schema"
        return self._rule(json_value(prepare(value.get("json_schema"), place), self._options)), False

    def regex(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        pattern = _text(value.get("pattern"), f"{path}.pattern")
        if fault := fault_of(pattern):
            raise _refusal(f"{path}.pattern", f"is {pattern!r:.80}: {fault}")
        inner = pattern.removeprefix("^")
        inner = inner[:-1] if inner.endswith("$") and not inner.endswith("\\$") else inner
        return self._terminal(f"/(?:{between_slashes(inner)})/"), False

    def grammar(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        text = _text(value.get("grammar"), f"{path}.grammar")
        if not is_gbnf(text):
            raise _refusal(f"{path}.grammar", "is not GBNF: name ::= ...")
        if any(rule.startswith("g_") for rule in self.rules):
            raise _refusal(f"{path}.grammar", "is a second one; one grammar is allowed")
        found = lark_of_gbnf(text, f"{path}.grammar")
        self.rules += found.rules
        return found.start, False

    def any_text(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        excluded = [_text(text, f"{path}.excludes[{n}]") for n, text in enumerate(value.get("excludes") or ())]
        body = without(excluded) if excluded else ANY_TEXT
        if not closing:
            return self._terminal(body), False
        if closing in self._control:
            return f"{self._terminal(body)} {self._marked(closing)}", True
        return self._rule(self._terminal(f"({body}) {literal(closing)}"), is_lazy=True), True

    def sequence(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        elements = _list(value.get("elements"), f"{path}.elements")
        parts: list[str] = []
        is_begun = is_closed = False  # is_begun: free text before this element holds the text that it begins with
        for n, element in enumerate(elements):
            here, is_final = f"{path}.elements[{n}]", n + 1 == len(elements)
            if is_begun:
                parts.append(self._rest(element, here, depth + 1))
                is_begun = False
            elif _is(element, "any_text") and not is_final:
                opening = _opening(elements[n + 1])
                if not opening:
                    raise _refusal(here, "is free text before something that does not begin with a fixed text")
                parts.append(self.node(element, here, opening, depth + 1)[0])
                is_begun = True
            else:
                part, is_closed = self.node(element, here, closing if is_final else None, depth + 1)
                parts.append(part)
        return " ".join(parts), is_closed

    def _rest(self, element: Mapping[str, Any], path: str, depth: int) -> str:
        """What follows the opening of a text or a tag."""
        return '""' if _is(element, "const_string") else self._tag_behind(element, path, depth)

    def either(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        options = _list(value.get("elements"), f"{path}.elements")
        found = []
        for n, option in enumerate(options):
            part, is_closed = self.node(option, f"{path}.elements[{n}]", closing, depth + 1)
            found.append(part if is_closed or not closing else f"{part} {self._marked(closing)}")
        return f"({' | '.join(found)})", bool(closing)

    def tag(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        begin = self._marked(_text(value.get("begin"), f"{path}.begin", may_be_empty=True))
        return f"{begin} {self._tag_behind(value, path, depth)}", False

    def _tag_behind(self, value: Mapping[str, Any], path: str, depth: int) -> str:
        """A tag's content and end."""
        end = _text(value.get("end"), f"{path}.end", may_be_empty=True)
        content, is_closed = self.node(value.get("content"), f"{path}.content", end, depth + 1)
        return content if is_closed else f"{content} {self._marked(end)}"

    def triggered_tags(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        if closing:
            raise _refusal(path, "holds free text to its end, so nothing can follow it")
        tags = self._tags(value, path)
        return (
            self._triggered(
                _list(value.get("triggers"), f"{path}.triggers"),
                tags,
                f"{path}.triggers",
                lambda n: f"{path}.tags[{n}].content",
                "tags",
                at_least_one=bool(value.get("at_least_one")),
                stops_after_first=bool(value.get("stop_after_first")),
            ),
            False,
        )

    def tags_with_separator(self, value: Mapping[str, Any], path: str, closing: str | None, depth: int) -> tuple[str, bool]:
        tags = self._tags(value, path)
        separator = self._marked(_text(value.get("separator"), f"{path}.separator", may_be_empty=True))
        found = [self.tag(tag, f"{path}.tags[{n}]", None, depth + 1)[0] for n, tag in enumerate(tags)]
        one = self._rule(" | ".join(found))
        more = "" if value.get("stop_after_first") else f" {repeated(f'{separator} {one}', 0, None)}"
        return (f"{one}{more}" if value.get("at_least_one") else f"({one}{more})?"), False

    def _tags(self, value: Mapping[str, Any], path: str) -> list[Mapping[str, Any]]:
        tags = _list(value.get("tags"), f"{path}.tags")
        for n, tag in enumerate(tags):
            here = f"{path}.tags[{n}]"
            _check_keys(tag, ("type", "begin", "content", "end"), here)
            _text(tag.get("begin"), f"{here}.begin")
            _text(tag.get("end"), f"{here}.end", may_be_empty=True)
        return tags

    def _marked(self, text: str) -> str:
        return marked(text, self._control) if text else '""'

    def _rule(self, body: str, *, is_lazy: bool = False) -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"PART_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name


_Build = Callable[[_Builder, Mapping[str, Any], str, str | None, int], tuple[str, bool]]
_NODES: Mapping[str, tuple[tuple[str, ...], _Build]] = {
    "const_string": (("value",), _Builder.const_string),
    "json_schema": (("json_schema", "style"), _Builder.json_schema),
    "regex": (("pattern",), _Builder.regex),
    "grammar": (("grammar",), _Builder.grammar),
    "any_text": (("excludes",), _Builder.any_text),
    "sequence": (("elements",), _Builder.sequence),
    "or": (("elements",), _Builder.either),
    "tag": (("begin", "content", "end"), _Builder.tag),
    "triggered_tags": (("triggers", "tags", "at_least_one", "stop_after_first"), _Builder.triggered_tags),
    "tags_with_separator": (("tags", "separator", "at_least_one", "stop_after_first"), _Builder.tags_with_separator),
}


def _is(node: Any, kind: str) -> bool:
    return isinstance(node, Mapping) and node.get("type") == kind


def _opening(node: Any) -> str | None:
    """The fixed text that a node begins with, if it does."""
    found = node.get("value") if _is(node, "const_string") else node.get("begin") if _is(node, "tag") else None
    return found if isinstance(found, str) else None


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _refusal(path, f"is {value!r:.80}; it must be a list that is not empty")
    return value


def _text(value: Any, path: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise _refusal(path, f"is {value!r:.80}; it must be a text")
    return value


def _check_keys(value: Any, known: Sequence[str], path: str) -> None:
    if not isinstance(value, Mapping):
        raise _refusal(path, f"is {value!r:.80}; it must be an object")
    for key in value:
        if key not in known:
            raise _refusal(f"{path}.{key}"[:256], f"is not known here; allowed are {', '.join(known)}")


def _refusal(path: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{path} {message}", param=path)
