"""An agent with tools, over several turns: the model chooses a tool and writes its argument, the program makes the call.

The choice is scored (`select`), the argument follows a pattern (`regex`): no call can be malformed.
"""

import ast
import operator

import streamserve as sgl

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
HOURS = {"monday": "10 to 4", "tuesday": "9 to 5", "thursday": "9 to 5", "saturday": "11 to 2"}


def calc(expression):
    """The value of `12 * 3` and the like."""
    tree = ast.parse(expression, mode="eval").body
    return SIGNS[type(tree.op)](ast.literal_eval(tree.left), ast.literal_eval(tree.right))


def hours(day):
    """When the shop is open."""
    return HOURS.get(day, "closed")


TOOLS = {"calc": calc, "hours": hours}
ARGUMENTS = {
    "calc": r"[1-9]\d{0,2} [-+*] [1-9]\d{0,2}\)",
    "hours": r"(monday|tuesday|wednesday|thursday|friday|saturday|sunday)\)",
}
EXAMPLES = (
    ("What do 5 baskets at 12 each cost?", "calc(5 * 12) = 60. They cost 60."),
    ("When are you open on Tuesday?", "hours(tuesday) = 9 to 5. We are open from 9 to 5."),
    ("What do 3 bags at 9 each cost?", "calc(3 * 9) = 27. They cost 27."),
    ("When are you open on Sunday?", "hours(sunday) = closed. We are closed."),
    ("When are you open on Thursday?", "hours(thursday) = 9 to 5. We are open from 9 to 5."),
)


@sgl.function
def clerk(s, questions):
    s += sgl.system("You are the clerk of a fruit shop. First you call a tool, calc or hours, then you answer with its result.")
    for question, turn in EXAMPLES:
        s += sgl.user(question) + sgl.assistant(turn)
    for i, question in enumerate(questions):
        s += sgl.user(question)
        with s.assistant():
            s += sgl.select(f"tool_{i}", list(TOOLS))
            tool = s[f"tool_{i}"]  # waits for the model: what comes next depends on it
            s += "(" + sgl.gen(f"argument_{i}", regex=ARGUMENTS[tool], stop=")", max_tokens=12) + ")"
            result = TOOLS[tool](s[f"argument_{i}"])
            s += f" = {result}." + sgl.gen(f"answer_{i}", max_tokens=24)
        print(f"{question}\n  {tool}({s[f'argument_{i}']}) = {result}\n  {s[f'answer_{i}'].strip()}")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        clerk.run(questions=["When are you open on Saturday?", "What do 7 boxes at 30 each cost?"], temperature=0)
