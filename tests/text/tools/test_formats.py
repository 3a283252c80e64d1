"""Every format reads what its models write, however it is cut, and its grammar takes that and nothing that breaks a schema."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.text import structure
from streamserve.text.tools.find import auto, find, instructions, names
from streamserve.text.tools.format import CallBegan, Content, Demand, Tool
from tests.text.grammars import CONTROL_IDS, Grammar
from tests.text.tools.answers import TOOLS, cuttings, events_of, read
from tests.text.tools.recorded import ANSWERS, Recorded

CASES = [pytest.param(name, case, id=f"{name}-{n}") for name, cases in ANSWERS.items() for n, case in enumerate(cases)]
FORMATS = sorted(ANSWERS)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_what_a_model_writes_is_read(name: str, case: Recorded) -> None:
    parser = find(name).parser(TOOLS)
    answer = read(find(name), case.text)
    events_of(parser, [case.text])
    assert parser.is_inside_call == case.is_cut
    if not case.is_cut:
        assert answer.made == list(case.calls)
    assert (answer.content, answer.thought) == (case.content, case.thought)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_character_at_a_time_is_read_the_same(name: str, case: Recorded) -> None:
    assert _read(name, list(case.text)) == _read(name, [case.text])


def _read(name: str, pieces: list[str]) -> list[object]:
    """Events, without ids that a format makes up."""
    events = events_of(find(name).parser(TOOLS), pieces)
    return [CallBegan(e.index, e.name) if isinstance(e, CallBegan) and name.startswith("mistral") else e for e in events]


FRAGMENTS = {
    name: sorted({case.text for case in cases} | {"<", "{", "}", "\n", " ", '"', "a", "[", "]", ",", *find(name).control_tokens})
    for name, cases in ANSWERS.items()
}


@st.composite
def _answers(draw: st.DrawFn, name: str) -> str:
    """Pieces of recorded answers one after another."""
    text = ""
    for fragment in draw(st.lists(st.sampled_from(FRAGMENTS[name]), max_size=6)):
        begin = draw(st.sampled_from((0, 0, 0, len(fragment) // 3)))
        end = draw(st.sampled_from((len(fragment), len(fragment), len(fragment), len(fragment) // 2)))
        text += fragment[begin:end]
    return text


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_where_an_answer_is_cut_changes_nothing(name: str, data: st.DataObject) -> None:
    text = data.draw(_answers(name))
    assert _read(name, data.draw(cuttings(text))) == _read(name, [text])


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@example(text="a\ud7ff\n\n b ")
@given(text=st.text(max_size=40))
def test_text_without_calls_comes_out_as_it_is(name: str, text: str) -> None:
    assert _read(name, list(text)) == ([Content(text)] if text else [])


def grammar(name: str, demand: Demand) -> Grammar:
    return Grammar(find(name).grammar(TOOLS, demand))


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_takes_the_calls_that_its_parser_reads(name: str) -> None:
    demanded, free = grammar(name, Demand(min_calls=1)), grammar(name, Demand())
    for case in ANSWERS[name]:
        if case.in_grammar:
            assert demanded.accepts(case.text), case.text
            assert free.accepts(case.text), case.text
    assert not demanded.accepts("")
    assert not demanded.begins("Sure, ")


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_call_is_all_there_may_be(name: str) -> None:
    one = grammar(name, Demand(min_calls=1, max_calls=1, only="get_weather"))
    case = next(case for case in ANSWERS[name] if case.in_grammar and [call[0] for call in case.calls] == ["get_weather"])
    assert one.accepts(case.text)
    assert not one.begins(case.text + "<")
    assert not one.begins(case.text.replace("get_weather", "now"))


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_are_held_to_their_schema(name: str) -> None:
    case = next(case for case in ANSWERS[name] if case.in_grammar and dict(case.calls).get("get_weather"))
    demanded = grammar(name, Demand(min_calls=1))
    for right, wrong in (("2", "two"), ("2", "2.5"), ("days", "nights"), ("get_weather", "get_whether")):
        assert not demanded.accepts(case.text.replace(right, wrong)), wrong
    broken = Tool("f", "", {"type": "object", "properties": {"a": {"not": {"minimum": 1}}}})
    with pytest.raises(InvalidRequest, match=r"tools\[f\]\.parameters\.properties\.a\.not"):
        find(name).grammar((broken,), Demand(min_calls=1))


@pytest.mark.parametrize("name", FORMATS)
def test_a_required_argument_must_come(name: str) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    open_one = Tool("f", "", {"type": "object", "properties": {"a": {"type": "boolean"}}})
    strict, free = (Grammar(find(name).grammar((each,), Demand(min_calls=1))) for each in (tool, open_one))
    empty = next(text for text in _empty_calls(name) if read(find(name), text, tools=(tool,)).calls)
    assert free.accepts(empty)
    assert not strict.accepts(empty)


def _empty_calls(name: str) -> list[str]:
    makers: list[Callable[[], str]] = [
        lambda: '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        lambda: '{"name": "f", "parameters": {}}',
        lambda: '[TOOL_CALLS][{"name": "f", "arguments": {}}]',
        lambda: "[TOOL_CALLS]f[ARGS]{}",
        lambda: "[f()]",
        lambda: "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        lambda: (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        lambda: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        lambda: (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>"
        ),
        lambda: "<tool_call>f\n</tool_call>",
        lambda: "<tool_call>f</tool_call>",
        lambda: "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}",
    ]
    order = (
        *("hermes", "llama3", "mistral", "mistral_args", "pythonic", "qwen3_coder"),
        *("deepseekv3", "deepseekv31", "kimi_k2", "glm45", "glm47", "gpt_oss"),
    )
    return [makers[order.index(name)]()]


@pytest.mark.parametrize("name", FORMATS)
def test_names_that_begin_alike_are_told_apart(name: str) -> None:
    case = next(case for case in ANSWERS[name] if case.in_grammar and [call[0] for call in case.calls] == ["get_weather"])
    tools = [replace(TOOLS[0], name=name) for name in ("get_weather", "get_weather_now", "get")]
    held = Grammar(find(name).grammar(tools, Demand(min_calls=1)))
    for tool in tools:
        assert held.accepts(case.text.replace("get_weather", tool.name))
    assert not held.begins(case.text.replace("get_weather", "get_we"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_may_hold_more_than_letters(name: str) -> None:
    case = next(case for case in ANSWERS[name] if case.in_grammar and [call[0] for call in case.calls] == ["get_weather"])
    tool = replace(TOOLS[0], name="web/v1.get-weather:now")
    text = case.text.replace("get_weather", tool.name)
    assert Grammar(find(name).grammar((tool,), Demand(min_calls=1))).accepts(text)
    assert [call.name for call in read(find(name), text, tools=(tool,)).calls] == [tool.name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_clients_own_grammar_may_stand_beside_calls(name: str) -> None:
    head = "<|channel|>final<|message|>" if name == "gpt_oss" else ""
    either = Grammar(find(name).grammar(TOOLS, Demand(), structure.ebnf('start: "yes" call_0?\ncall_0: "!" | "}"\n')))
    assert either.accepts(head + "yes!") and either.accepts(head + "yes}") and not either.begins(head + "no")
    with pytest.raises(InvalidRequest, match="%ignore"):
        find(name).grammar(TOOLS, Demand(), structure.ebnf('start: "a" "b"\n%ignore / /\n'))


@pytest.mark.parametrize("name", FORMATS)
def test_free_text_needs_no_call(name: str) -> None:
    text = "<|channel|>final<|message|>No call, 1 < 2." if name == "gpt_oss" else "No call, 1 < 2."
    assert grammar(name, Demand()).accepts(text)
    assert grammar(name, Demand(max_calls=0)).accepts(text)


@pytest.mark.parametrize("name", FORMATS)
def test_a_final_answer_by_a_schema_may_come_instead(name: str) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False}
    either = Grammar(find(name).grammar(TOOLS, Demand(), structure.json_schema(schema, "schema")))
    head = "<|channel|>final<|message|>" if name == "gpt_oss" else ""
    assert either.accepts(head + '{"sum":3}')
    assert not either.begins(head + "Sure")
    for case in ANSWERS[name]:
        if case.in_grammar:
            assert either.accepts(case.text), case.text


@pytest.mark.parametrize("name", FORMATS)
def test_control_tokens_are_demanded_as_tokens(name: str) -> None:
    found = find(name)
    control = dict(zip(found.control_tokens, CONTROL_IDS, strict=False))
    text = find(name, control).grammar(TOOLS, Demand(min_calls=1))
    for case in ANSWERS[name]:
        if case.in_grammar:
            assert Grammar(text, control).accepts(case.text), case.text


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("gpt_oss", "llama3", "pythonic")])
@pytest.mark.parametrize("is_control", [False, True])
def test_calls_stand_in_free_text(name: str, is_control: bool) -> None:
    found = find(name)
    control = dict(zip(found.control_tokens, CONTROL_IDS, strict=False)) if is_control else {}
    free = Grammar(find(name, control).grammar(TOOLS, Demand()), control)
    once = Grammar(find(name, control).grammar(TOOLS, Demand(max_calls=1)), control)
    case = next(case for case in ANSWERS[name] if case.in_grammar and len(case.calls) == 1)
    assert free.accepts(f"Let me look. {case.text} and {case.text}")
    assert not free.begins(f"Let me look. {case.text.replace('get_weather', 'nope').replace('now', 'nope')}")
    assert once.accepts(f"Let me look. {case.text} Done.")
    assert not once.begins(f"Let me look. {case.text} and {case.text}")


@pytest.mark.parametrize("name", FORMATS)
def test_a_tool_without_a_schema_takes_anything_or_nothing(name: str) -> None:
    """Absent parameters mean none; an empty schema means any."""
    text = _empty_calls(name)[0]
    for parameters in (None, {}, {"type": "object"}, {"type": "object", "properties": {}}, {"properties": {}}):
        assert Grammar(find(name).grammar((Tool("f", "", parameters),), Demand(min_calls=1))).accepts(text)


@pytest.mark.parametrize("name", ["hermes", "llama3", "pythonic", "qwen3_coder", "glm45"])
def test_a_thousand_tools_fit(name: str) -> None:
    """Ranges of numbers are compiled once for all of them."""
    tools = [replace(TOOLS[n % 2], name=f"tool_{n}") for n in range(1000)]
    Grammar(find(name).grammar(tools, Demand(min_calls=1)))


def test_tools_of_too_many_parts_are_refused_at_once() -> None:
    properties = {f"p{n}": {"type": "string"} for n in range(1000)}
    tools = [Tool(f"f{n}", "", {"type": "object", "properties": properties}) for n in range(100)]
    with pytest.raises(InvalidRequest, match="parts in all"):
        find("hermes").grammar(tools, Demand(min_calls=1))


def test_definitions_of_several_tools_do_not_mix() -> None:
    tools = [
        Tool(f"f{n}", "", {"type": "object", "$defs": {"x": {"enum": [n]}}, "properties": {"a": {"$ref": "#/$defs/x"}}})
        for n in range(3)
    ]
    held = Grammar(find("hermes").grammar(tools, Demand(min_calls=1)))
    for n in range(3):
        assert held.accepts(f'<tool_call>\n{{"name": "f{n}", "arguments": {{"a": {n}}}}}\n</tool_call>')
        assert not held.begins(f'<tool_call>\n{{"name": "f{n}", "arguments": {{"a": {(n + 1) % 3}')


@pytest.mark.parametrize("name", FORMATS)
def test_enums_and_patterns_are_held_in_every_way_of_writing(name: str) -> None:
    tool = Tool(
        "get_weather",
        "",
        {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^B[a-z]{2,4}$"}, "days": {"enum": [1, 2, "many"]}},
            "required": ["city", "days"],
        },
    )
    held = Grammar(find(name).grammar((tool,), Demand(min_calls=1)))
    case = next(case for case in ANSWERS[name] if case.in_grammar and [call[0] for call in case.calls] == ["get_weather"])
    assert held.accepts(case.text)
    for wrong in (case.text.replace("Brno", "Praha"), case.text.replace("Brno", "Bratislava"), case.text.replace("2", "3")):
        assert not held.accepts(wrong), wrong


TEMPLATES = {
    "hermes": 'For each function call: <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>',
    "qwen3_coder": "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>",
    "mistral": '{{- "[TOOL_CALLS][" }}',
    "mistral_args": '{{- "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}',
    "llama3": '{"name": function name, "parameters": dictionary of argument name and its value}',
    "pythonic": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
    "deepseekv3": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n' + '```json'",
    "deepseekv31": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜>' + arguments",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>",
    "glm47": "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>",
    "gpt_oss": '{{- "<|start|>assistant to=functions." }} <|channel|>commentary',
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_template_shows_the_format(name: str) -> None:
    assert auto(TEMPLATES[name]).name == name


def test_llama_4_is_read_as_its_template_tells_it_to_write() -> None:
    told = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    assert auto(told + "{{- '<|python_start|>' }}").name == "llama3"
    assert auto("{{- '<|python_start|>' }}").name == "pythonic"


def test_json_that_is_an_answer_is_not_held_back() -> None:
    parser = find("llama3").parser(TOOLS)
    assert parser.push('{"city": ') == [Content('{"city":')]
    assert [*parser.push('"Brno"}'), *parser.finish()] == [Content(' "Brno"}')]


def test_a_template_that_shows_nothing_gets_the_format_that_is_described() -> None:
    assert auto(None).name == auto("{{ messages }}").name == "hermes"
    text = instructions(TOOLS)
    assert all(json.dumps(tool.name) in text for tool in TOOLS) and "<tool_call>" in text


def test_every_name_is_found_and_others_are_refused() -> None:
    assert {find(name).name for name in names()} == set(ANSWERS)
    with pytest.raises(InvalidRequest, match="hermes"):
        find("xml")


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["soon", "2024-13-01"]),
        (
            {"anyOf": [{"type": "string", "format": "uuid"}, {"type": "null"}]},
            ["null", "0" * 8 + "-0000" * 3 + "-" + "0" * 12],
            ["x"],
        ),
        ({"anyOf": [{"enum": ["a b", "c"]}, {"type": "null"}]}, ["a b", "null"], ["a", "none"]),
        ({"anyOf": [{"$ref": "#/$defs/kind"}, {"type": "integer"}]}, ["one", "3"], ["two", "3.5"]),
        ({"type": ["string", "integer"], "maxLength": 2, "minimum": 100}, ["ab", "123"], ["abc"]),
        ({"type": ["string", "null"]}, ["any\n text", "null"], []),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}, ["[1]", "[x"], []),
        ({"anyOf": [{"const": "all"}, {"type": "array", "items": {"type": "integer"}}]}, ["[1, 2]", "all"], ["[x]", "1"]),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "glm47"])
@pytest.mark.parametrize("is_control", [False, True])
def test_texts_between_tags_are_held_to_their_schema(
    name: str, is_control: bool, schema: object, right: list[str], wrong: list[str]
) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": {"kind": {"const": "one"}}})
    control = dict(zip(find(name).control_tokens, CONTROL_IDS, strict=False)) if is_control else {}
    held = Grammar(find(name, control).grammar((tool,), Demand(min_calls=1)), control)
    write = {
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>",
        "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
        "glm47": "<tool_call>f<arg_key>a</arg_key><arg_value>{}</arg_value></tool_call>",
    }[name]
    assert [text for text in right if not held.accepts(write.format(text))] == []
    assert [text for text in wrong if held.accepts(write.format(text))] == []
