"""Answers as models of each format write them, beside what they mean. Every one of them is read, cut anywhere, by the formats'
parsers, and those that are calls alone are taken by the formats' grammars."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recorded:
    """One answer. `in_grammar`: a grammar that demands calls takes it; its argument order and spacing are the templates' own."""

    text: str
    calls: Sequence[tuple[str, Any]] = ()
    content: str = ""
    thought: str = ""
    in_grammar: bool = False
    is_cut: bool = False


WEATHER = ("get_weather", {"city": "Brno", "days": 2})
ADD = ("add", {"a": 1, "b": -2.5})
NOTE = ("write_note", {"text": 'Two "lines"\nžluťoučký 🦙', "tags": ["a", "b c"], "meta": {"pinned": True, "of": None}})

_DS = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
_NOTE_JSON = '{"text": "Two \\"lines\\"\\nžluťoučký 🦙", "tags": ["a", "b c"], "meta": {"pinned": true, "of": null}}'
_WEATHER_JSON, _ADD_JSON = '{"city": "Brno", "days": 2}', '{"a": 1, "b": -2.5}'


def _ds(*calls: tuple[str, str], is_fenced: bool = True) -> str:
    begin, call, separator, end, all_end = _DS
    if is_fenced:
        return begin + "\n".join(f"{call}function{separator}{n}\n```json\n{a}\n```{end}" for n, a in calls) + all_end
    return begin + "".join(f"{call}{n}{separator}{a}{end}" for n, a in calls) + all_end


def _kimi(*calls: tuple[str, str]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for n, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


_QWEN_WEATHER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nBrno\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
_QWEN_NOTE = (
    '<tool_call>\n<function=write_note>\n<parameter=text>\nTwo "lines"\nžluťoučký 🦙\n</parameter>\n<parameter=tags>\n'
    '["a", "b c"]\n'
    '</parameter>\n<parameter=meta>\n{"pinned": true, "of": null}\n</parameter>\n</function>\n</tool_call>'
)
_GLM_WEATHER = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Brno</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>"
)
_GLM_NOTE = (
    '<tool_call>write_note\n<arg_key>text</arg_key>\n<arg_value>Two "lines"\nžluťoučký 🦙</arg_value>\n<arg_key>tags</arg_key>\n'
    '<arg_value>["a", "b c"]</arg_value>\n<arg_key>meta</arg_key>\n'
    '<arg_value>{"pinned": true, "of": null}</arg_value>\n</tool_call>'
)

ANSWERS: dict[str, list[Recorded]] = {
    "hermes": [
        Recorded(
            f'<tool_call>\n{{"name": "get_weather", "arguments": {_WEATHER_JSON}}}\n</tool_call>', [WEATHER], in_grammar=True
        ),
        Recorded(
            f'<tool_call>\n{{"name": "write_note", "arguments": {_NOTE_JSON}}}\n</tool_call>\n<tool_call>\n'
            f'{{"name": "add", "arguments": {_ADD_JSON}}}\n</tool_call>',
            [NOTE, ADD],
            in_grammar=True,
        ),
        Recorded('Sure!\n<tool_call>{"arguments":{},"name":"now"}</tool_call>\n', [("now", {})], "Sure!"),
        Recorded(f'<tool_call>\n{{"name": "add", "arguments": {_ADD_JSON}}}}}\n</tool_call>', [ADD]),
        Recorded(
            '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
            content='<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        ),
    ],
    "llama3": [
        Recorded(f'{{"name": "get_weather", "parameters": {_WEATHER_JSON}}}', [WEATHER], in_grammar=True),
        Recorded(
            f'{{"name": "add", "parameters": {_ADD_JSON}}}; {{"name": "write_note", "parameters": {_NOTE_JSON}}}',
            [ADD, NOTE],
            in_grammar=True,
        ),
        Recorded(f'<|python_tag|>{{"type": "function", "name": "add", "parameters": {_ADD_JSON}}}', [ADD]),
        Recorded(f'I call it. <|python_tag|>{{"name": "add", "arguments": {_ADD_JSON}}}', [ADD], "I call it."),
        Recorded(f'{{"name": "add", "parameters": {_ADD_JSON}}} as asked', [ADD], " as asked"),
        Recorded(
            f'<|python_start|>I look.<|python_end|>{{"name": "add", "parameters": {_ADD_JSON}}}'
            '{"name": "now", "parameters": {}}',
            [ADD, ("now", {})],
            "I look.",
        ),
        Recorded(f'<|python_start|>{{"name": "add", "parameters": {_ADD_JSON}}}<|python_end|>', [ADD]),
        Recorded(f'{{"name": "add", "parameters": {_ADD_JSON}}}}}', [ADD]),
        Recorded('{"name": "now", "parameters": ""}', [("now", {})]),
        Recorded('{"name": "Ada", "parameters": 3}', content='{"name": "Ada", "parameters": 3}'),
        Recorded('{"name": "add"}', content='{"name": "add"}'),
        Recorded("<|python_tag|>print(1)", content="<|python_tag|>print(1)"),
        Recorded('As JSON: {"name": "add", "parameters": {}}', content='As JSON: {"name": "add", "parameters": {}}'),
    ],
    "mistral": [
        Recorded(f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {_WEATHER_JSON}}}]', [WEATHER], in_grammar=True),
        Recorded(
            f'[TOOL_CALLS][{{"name": "add", "arguments": {_ADD_JSON}}}, {{"name": "write_note", "arguments": {_NOTE_JSON}}}]',
            [ADD, NOTE],
            in_grammar=True,
        ),
        Recorded(f'Fine. [TOOL_CALLS] [{{"name":"add","arguments":{_ADD_JSON},"id":"abc123XYZ"}}]\n', [ADD], "Fine."),
        Recorded(f"[TOOL_CALLS]add[ARGS]{_ADD_JSON}[TOOL_CALLS]now[ARGS]{{}}", [ADD, ("now", {})]),
        Recorded("[TOOL_CALLS]nope[ARGS]{}", content="[TOOL_CALLS]nope[ARGS]{}"),
        Recorded("[TOOL_CALLS] [1]", content="[TOOL_CALLS] [1]"),
    ],
    "mistral_args": [
        Recorded(f"[TOOL_CALLS]get_weather[ARGS]{_WEATHER_JSON}", [WEATHER], in_grammar=True),
        Recorded(f"[TOOL_CALLS]add[ARGS]{_ADD_JSON}[TOOL_CALLS]write_note[ARGS]{_NOTE_JSON}", [ADD, NOTE], in_grammar=True),
        Recorded(f"Fine.[TOOL_CALLS]add[CALL_ID]abc123XYZ[ARGS]{_ADD_JSON}", [ADD], "Fine."),
        Recorded(f"[TOOL_CALLS]add[CALL_ID]abc123XYZ[ARGS]{_ADD_JSON}", [ADD], in_grammar=True),
        Recorded('[TOOL_CALLS]add[ARGS]{"a": 1', [], is_cut=True),
    ],
    "pythonic": [
        Recorded('[get_weather(city="Brno", days=2)]', [WEATHER], in_grammar=True),
        Recorded(
            '[add(a=1, b=-2.5), write_note(text="Two \\"lines\\"\\nžluťoučký 🦙", '
            'tags=["a", "b c"], meta={"pinned": true, "of": null})]',
            [ADD, NOTE],
            in_grammar=True,
        ),
        Recorded(
            "<|python_start|>[write_note(text='Two \"lines\"\\n\\u017elu\\x74ou\\u010dk\\xfd \\U0001F999', tags=['a', 'b' ' c',],"
            "meta={'pinned': True, 'of': None}), now()]<|python_end|>",
            [("write_note", {**NOTE[1], "text": 'Two "lines"\nžlutoučký 🦙'}), ("now", {})],
        ),
        Recorded("[add(+1, b = .5e1)]", [("add", {"a": 1, "b": 5.0})]),
        Recorded("[add(a=0x1F, b=1_000)]", [("add", {"a": 31, "b": 1000})]),
        Recorded(
            "[write_note(text='''a'b''c\n''', tags=('x', 'y'), meta=dict(a=1))]",
            [("write_note", {"text": "a'b''c\n", "tags": ["x", "y"], "meta": "dict(a=1)"})],
        ),
        Recorded(
            "[write_note(text=r'\\d', tags=(), meta={1: (2)})]", [("write_note", {"text": "\\d", "tags": [], "meta": {"1": 2}})]
        ),
        Recorded("[nope(a=1)]", content="[nope(a=1)]"),
        Recorded("[1, 2, 3]", content="[1, 2, 3]"),
        Recorded("See [add(a=1)]", content="See [add(a=1)]"),
        Recorded("[now()] and that", [("now", {})], " and that"),
        Recorded('[write_note(text="abc', [], is_cut=True),
    ],
    "qwen3_coder": [
        Recorded(_QWEN_WEATHER, [WEATHER], in_grammar=True),
        Recorded(f"{_QWEN_NOTE}\n{_QWEN_WEATHER}", [NOTE, WEATHER], in_grammar=True),
        Recorded(
            "I'll look.\n\n<function=get_weather>\n<parameter=city>\n2\n</parameter>\n</function>",
            [("get_weather", {"city": "2"})],
            "I'll look.",
        ),
        Recorded(
            "<tool_call><function=write_note><parameter=text>a\n\n<b>\n"
            "<parameter=meta>\n{'pinned': True, 'of': None}\n</function></tool_call>",
            [("write_note", {"text": "a\n\n<b>", "meta": {"pinned": True, "of": None}})],
        ),
        Recorded("<tool_call>\n<function=now>\n</function>\n</tool_call>", [("now", {})], in_grammar=True),
        Recorded("<tool_call>\n<function=nope>\n</function>", content="<tool_call>\n<function=nope>\n</function>"),
        Recorded("<tool_call>\n<function=get_weather>\n<parameter=city>\nBrn", [], is_cut=True),
        Recorded(
            "<function=add>\n<parameter=a>\n1.50\n</parameter>\n<parameter=b>\nmany\n</parameter>\n</function>",
            [("add", {"a": 1.5, "b": "many"})],
        ),
    ],
    "deepseekv3": [
        Recorded(_ds(("get_weather", _WEATHER_JSON)), [WEATHER], in_grammar=True),
        Recorded(_ds(("write_note", _NOTE_JSON), ("add", _ADD_JSON)), [NOTE, ADD], in_grammar=True),
        Recorded("Hm.\n" + _ds(("add", _ADD_JSON), is_fenced=False) + "\n", [ADD], "Hm."),
        Recorded(_ds(("nope", "{}")), content=_ds(("nope", "{}"))),
    ],
    "deepseekv31": [
        Recorded(_ds(("get_weather", _WEATHER_JSON), is_fenced=False), [WEATHER], in_grammar=True),
        Recorded(_ds(("add", f"```json\n{_ADD_JSON}\n```"), is_fenced=False), [ADD]),
        Recorded(_ds(("write_note", _NOTE_JSON), ("now", "{}"), is_fenced=False), [NOTE, ("now", {})], in_grammar=True),
    ],
    "kimi_k2": [
        Recorded(_kimi(("get_weather", _WEATHER_JSON)), [WEATHER], in_grammar=True),
        Recorded("So: " + _kimi(("write_note", _NOTE_JSON), ("now", "")), [NOTE, ("now", {})], "So:"),
        Recorded(_kimi(("add", _ADD_JSON), ("write_note", _NOTE_JSON)), [ADD, NOTE], in_grammar=True),
        Recorded(_kimi(("nope", "{}")), content=_kimi(("nope", "{}"))),
    ],
    "glm45": [
        Recorded(_GLM_WEATHER, [WEATHER], in_grammar=True),
        Recorded(f"{_GLM_NOTE}\n{_GLM_WEATHER}", [NOTE, WEATHER], in_grammar=True),
        Recorded("Hm.\n<tool_call>now</tool_call>\n<tool_call>now\n</tool_call>", [("now", {}), ("now", {})], "Hm."),
        Recorded("<tool_call>nope\n</tool_call>", content="<tool_call>nope\n</tool_call>"),
        Recorded("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Br", [], is_cut=True),
    ],
    "glm47": [
        Recorded(_GLM_WEATHER.replace("\n", ""), [WEATHER], in_grammar=True),
        Recorded("<tool_call>now</tool_call>", [("now", {})], in_grammar=True),
    ],
    "gpt_oss": [
        Recorded(
            '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Brno","days":2}<|call|>',
            [WEATHER],
        ),
        Recorded(
            '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Brno","days":2}',
            [WEATHER],
            in_grammar=True,
        ),
        Recorded(
            "<|channel|>analysis<|message|>Let me < think.\n<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            f"<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{_ADD_JSON}<|call|>",
            [ADD],
            "I look.",
            "Let me < think.\n",
        ),
        Recorded("<|channel|>final<|message|>Hello <b>!<|return|>", content="Hello <b>!"),
        Recorded(" to=functions.now<|channel|>commentary<|message|><|call|>", [("now", {})]),
        Recorded("Bare text", content="Bare text"),
        Recorded(
            "<|channel|>commentary to=browser.open<|message|>{}", content="<|channel|>commentary to=browser.open<|message|>{}"
        ),
        Recorded('<|channel|>commentary to=functions.add<|message|>{"a": 1', [], is_cut=True),
    ],
}
