"""An agent with tools, over several turns: the model chooses a tool and writes its argument, the program makes the call.

The choice is scored (`select`), the argument follows a pattern (`regex`): no call can be malformed.
"""

import ast
import operator

import streamserve as sgl

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
STOCK = {"apples": 41, "pears": 7, "plums": 0}


def calculate(expression):
    """The value of `12 * 3` and the like."""
    tree = ast.parse(expression, mode="eval").body
    return SIGNS[type(tree.op)](ast.literal_eval(tree.left), ast.literal_eval(tree.right))


def stock(fruit):
    """How many are in the shop."""
    return f"{STOCK[fruit]} {fruit}"


TOOLS = {"calculate": calculate, "stock": stock}
ARGUMENTS = {"calculate": r"[1-9]\d{0,3} [-+*] [1-9]\d{0,3}", "stock": "apples|pears|plums"}
RULES = """You are the clerk of a fruit shop. Use one tool for each question:
calculate(12 * 3) for sums, stock(apples) for how many apples, pears or plums there are."""


@sgl.function
def clerk(s, questions):
    s += sgl.system(RULES)
    s += sgl.user("How much are 5 baskets at 12 each?") + sgl.assistant("calculate(5 * 12)")
    s += sgl.user("Do we have pears?") + sgl.assistant("stock(pears)")
    for i, question in enumerate(questions):
        s += sgl.user(question)
        with s.assistant():
            s += sgl.select(f"tool_{i}", list(TOOLS))
            tool = s[f"tool_{i}"]  # waits for the model: what comes next depends on it
            s += "(" + sgl.gen(f"argument_{i}", regex=ARGUMENTS[tool], max_tokens=12) + ")"
        result = TOOLS[tool](s[f"argument_{i}"])
        print(f"{question}\n  {tool}({s[f'argument_{i}']}) -> {result}")
        s += sgl.user(f"The tool says: {result}. Tell the customer.")
        s += sgl.assistant(sgl.gen(f"answer_{i}", max_tokens=40))
        print(" ", s[f"answer_{i}"].strip())


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        clerk.run(questions=["How many apples do we have?", "How much are 7 melons at 30 each?"], temperature=0)
