"""What a program writes is what the chat template writes, for templates of all styles."""

from typing import Any

import pytest

from streamserve.errors import InvalidRequest
from streamserve.lang.roles import PLACE, TemplateRoles, roles_of
from streamserve.lang.templates import TEMPLATES
from streamserve.text.template import ChatTemplate
from tests.lang import styles

STYLES = {**styles.STYLES, **TEMPLATES}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 + 3?"), ("assistant", "6."), ("user", "Thanks. 4 + 4?")]


def written(roles: TemplateRoles, turns: list[tuple[str, str]], *, opens: bool) -> str:
    """The text of a program that says these turns, and then asks for an answer."""
    text, before = "", ()
    for role, content in turns:
        text += roles.begin(before, role, is_written=True) + content + roles.end(before, role)
        before = (*before, role)
    return text + (roles.begin(before, "assistant") if opens else "")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_turns", [1, 3, 5])
@pytest.mark.parametrize("has_system", [False, True])
def test_program_writes_what_the_template_writes(style: str, num_turns: int, has_system: bool) -> None:
    roles, template = (made(STYLES[style], special_tokens=TOKENS) for made in (TemplateRoles, ChatTemplate))
    turns = [*([("system", "Be brief.")] if has_system else []), *TURNS[:num_turns]]
    messages = [{"role": role, "content": content} for role, content in turns]
    if style == "no-system" and has_system:
        with pytest.raises(InvalidRequest, match=r"chat template of gemma refuses turns of system.*System role not supported"):
            written(TemplateRoles(STYLES[style], name="gemma"), turns, opens=True)
        return
    assert written(roles, turns, opens=True) == template.render(messages)
    ended = template.render([*messages, {"role": "assistant", "content": "8."}, {"role": "user", "content": "Bye."}])
    assert written(roles, [*turns, ("assistant", "8."), ("user", "Bye.")], opens=True) == ended
    assert ended.startswith(written(roles, [*turns, ("assistant", "8.")], opens=False))


def test_answer_closes_where_it_was_opened_by_the_template() -> None:
    roles = TemplateRoles(STYLES["opens-thought"], special_tokens=TOKENS)
    assert roles.begin(("user",), "assistant") == "<｜Assistant｜><think>\n"
    assert roles.begin(("user",), "assistant", is_written=True) == "<｜Assistant｜>"
    assert roles.end(("user",), "assistant") == "<｜end｜>"


def test_refused_order_says_whose_template_refuses_it() -> None:
    roles = TemplateRoles(STYLES["merges-system"], special_tokens=TOKENS, name="gemma-3-4b-it")
    with pytest.raises(InvalidRequest, match="of gemma-3-4b-it refuses turns of user, user: roles must alternate"):
        roles.begin(("user",), "user")


def test_system_turn_that_a_template_moves_to_the_last_user_stays_where_it_was_said() -> None:
    source = (  # Mistral
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
        "{% set s = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (s if loop.last else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    roles, template = (made(source, special_tokens=TOKENS) for made in (TemplateRoles, ChatTemplate))
    turns = [("system", "S"), ("user", "U")]
    assert written(roles, turns, opens=True) == template.render([{"role": r, "content": c} for r, c in turns])
    assert (
        written(roles, [*turns, ("assistant", "A"), ("user", "V")], opens=True) == "<s>[INST] S\n\nU[/INST] A</s>[INST] V[/INST]"
    )


@pytest.mark.parametrize(
    ("written_for_picture", "marker", "image"),
    [
        ("{{ '<|vision|><|pad|><|end|>' }}", "<|vision|><|pad|><|end|>", "<|vision|><|pad|><|end|>"),
        ("{{ '<image>\n' }}", "<image>", "<image>\n"),  # LLaVA: a line of its own
        ("", "<image>", PLACE + "\n"),  # the chat route joins a message's texts with newlines
        ("", None, PLACE + "\n"),
    ],
)
def test_picture_is_marked_as_the_template_marks_it(written_for_picture: str, marker: str | None, image: str) -> None:
    source = (
        "{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}"
        "{% if p.type == 'image' %}"
        + written_for_picture
        + "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    roles = TemplateRoles(source, marker=marker)
    assert roles.image == image and roles.marks_places == (PLACE in image)


def test_pieces_are_rendered_once() -> None:
    roles = TemplateRoles(STYLES["trims"], special_tokens=TOKENS)
    assert written(roles, TURNS, opens=True) == written(roles, TURNS, opens=True)
    count = 0
    template: Any = roles._template
    render = template.render

    def counted(*args: Any, **options: Any) -> str:
        nonlocal count
        count += 1
        return str(render(*args, **options))

    template.render = counted
    written(roles, TURNS, opens=True)
    assert count == 0


def test_unknown_name_of_a_template_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="allowed is a template's text, or one of default, chatml"):
        roles_of("chatmll")
