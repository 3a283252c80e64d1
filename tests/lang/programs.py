"""Programs with the shapes of those that SGLang tests its language with (its test/test_programs.py); words and code are our own.

Owns the programs, not what must come of them: test_programs.py runs them against a server and against an engine of this process.
What SGLang's program of a name does is kept: which nodes, which roles, where it reads its own variables, where it forks.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import streamserve as sgl
from streamserve.lang.dtypes import REGEX_FLOAT, REGEX_INT, REGEX_STR

State = Any  # a program's state: programs of users do not name its type either
IP_ADDRESS = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
NUM_TIPS = 3


@sgl.function
def few_shot_qa(s: State, country: str) -> None:
    """Examples as plain text, one line generated."""
    s += "Countries and their capitals.\n\n"
    s += "Country: Spain\nCapital: Madrid\n\n"
    s += "Country: Italy\nCapital: Rome\n\n"
    s += "Country: Portugal\nCapital: Lisbon\n\n"
    s += "Country: " + country + "\n"
    s += "Capital:" + sgl.gen("capital", stop="\n", temperature=0, max_tokens=8)


@sgl.function
def mt_bench(s: State, first: str, second: str) -> None:
    """Two turns; one written as calls, one as context managers."""
    s += sgl.system("You answer in one short sentence.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("answer_1"))
    with s.user():
        s += second
    with s.assistant():
        s += sgl.gen("answer_2")


@sgl.function
def select(s: State, review: str) -> None:
    """One of three words, scored."""
    s += "Say whether a review is positive, negative or neutral.\n"
    s += "Review: I loved every minute of it.\nVerdict: positive\n"
    s += "Review: It broke on the first day.\nVerdict: negative\n"
    s += "Review: " + review + "\n"
    s += "Verdict:" + sgl.select("verdict", [" positive", " negative", " neutral"])


@sgl.function
def decode_int(s: State) -> None:
    """Whole numbers inside running text."""
    s += "The number of hours in a day is 24\nThe number of months in a year is 12\n"
    s += "The number of days in a week is " + sgl.gen_int("days") + "\n"
    s += "The number of seconds in a minute is " + sgl.gen_int("seconds") + "\n"


@sgl.function
def decode_json(s: State) -> None:
    """An object whose frame is the program's and whose values are the model's, by type."""
    s += "Facts about Berlin as a JSON object.\n"
    with s.var_scope("facts"):
        s += "{\n"
        s += '  "city": ' + sgl.gen_string() + ",\n"
        s += '  "people": ' + sgl.gen_int() + ",\n"
        s += '  "districts": ' + sgl.gen(dtype=int) + ",\n"
        s += '  "river": ' + sgl.gen(dtype=str) + "\n"
        s += "}"


@sgl.function
def decode_json_regex(s: State) -> None:
    """The same by the types' expressions, with stops."""
    s += "Facts about Berlin as a JSON object.\n"
    with s.var_scope("facts"):
        s += "{\n"
        s += '  "city": ' + sgl.gen(regex=REGEX_STR) + ",\n"
        s += '  "people": ' + sgl.gen(regex=REGEX_INT, stop=[" ", "\n"]) + ",\n"
        s += '  "latitude": ' + sgl.gen(regex=REGEX_FLOAT, stop=[" ", "\n"]) + "\n"
        s += "}"


@sgl.function
def dtypes(s: State) -> None:
    """Each type that a node can have."""
    s += "The capital of France is " + sgl.gen("string", dtype=str) + "\n"
    s += "The year after 1999 is " + sgl.gen("whole", dtype=int) + "\n"
    s += "Half of five is " + sgl.gen("real", dtype=float) + "\n"
    s += "Is snow white? " + sgl.gen("truth", dtype=bool) + "\n"


@sgl.function
def expert_answer(s: State, question: str) -> None:
    """A variable is read while the program is being written, and goes back into it."""
    s += "Question: " + question + "\n"
    s += "The best person to ask is a" + sgl.gen("expert", stop=[".", "\n"], max_tokens=12) + ".\n"
    s += "Ask a" + s["expert"] + ", and the answer will be:" + sgl.gen("answer", stop=[".", "\n"], max_tokens=24) + "."


def calculate(expression: str) -> str:
    """The value of a sum or product of whole numbers."""
    signs: dict[type[ast.operator], Callable[[int, int], int]] = {ast.Mult: operator.mul, ast.Add: operator.add}
    tree = ast.parse(expression.strip(), mode="eval").body
    if not isinstance(tree, ast.BinOp) or type(tree.op) not in signs:
        raise ValueError(f"cannot calculate {expression!r}")
    left, right = ast.literal_eval(tree.left), ast.literal_eval(tree.right)
    return str(signs[type(tree.op)](left, right))


@sgl.function
def tool_use(s: State, left: int, right: int) -> None:
    """A tool is called with what was generated; its result is a variable of the text."""
    s += "A calculator is at hand: calc(expression) is the result.\n"
    s += "What is the product of 12 and 7? calc(12 * 7) = 84\n"
    s += "What is the product of 33 and 58? calc(33 * 58) = 1914\n"
    s += f"What is the product of {left} and {right}? calc(" + sgl.gen("expression", stop=")", max_tokens=16) + ") = "
    with s.var_scope("result"):
        s += calculate(s["expression"])


@sgl.function
def react(s: State, question: str) -> None:
    """Thoughts, and actions that are chosen: the program's way depends on its variables."""
    s += "Question: Who wrote the book that the film Jaws was made from?\n"
    s += "Thought 1: I must find the book behind the film Jaws.\nAction 1: Search [book behind the film Jaws]\n"
    s += "Observation 1: The film was made from a novel by Peter Benchley.\n"
    s += "Thought 2: It was Peter Benchley.\nAction 2: Finish [Peter Benchley]\n\n"
    s += "Question: " + question + "\n"
    for i in range(1, 4):
        s += f"Thought {i}:" + sgl.gen(stop=[".", "\n"], max_tokens=20) + ".\n"
        s += f"Action {i}: " + sgl.select(f"action_{i}", ["Search", "Finish"])
        if s[f"action_{i}"] == "Finish":
            s += " [" + sgl.gen("answer", stop=["]", "\n"], max_tokens=12) + "]\n"
            return
        s += " [" + sgl.gen(stop=["]", "\n"], max_tokens=12) + "]\n"
        s += f"Observation {i}:" + sgl.gen(stop=[".", "\n"], max_tokens=20) + ".\n"
    s += "Answer:" + sgl.gen("answer", stop="\n", max_tokens=12)


@sgl.function
def parallel_decoding(s: State, topic: str) -> None:
    """A skeleton, then all of its parts at once, then a summary of them."""
    s += "USER: Give tips for " + topic + ".\n"
    s += f"ASSISTANT: Here are {NUM_TIPS} short tips:\n"
    for i in range(1, NUM_TIPS + 1):
        s += f"{i}." + sgl.gen(f"tip_{i}", max_tokens=12, stop=[".", "\n"]) + ".\n"
    forks = s.fork(NUM_TIPS)
    for i in range(NUM_TIPS):
        forks[i] += f"Tip {i + 1} in more words:"
        forks[i] += sgl.gen("detail", max_tokens=16, stop=["\n"])
    forks.join()
    for i in range(NUM_TIPS):
        s += f"Tip {i + 1}:" + forks[i]["detail"] + "\n"
    s += "In short," + sgl.gen("summary", max_tokens=16)


@sgl.function
def parallel_encoding(s: State, facts: list[str], question: str) -> None:
    """Parts are read side by side and put behind one another."""
    s += "Some facts.\n"
    forks = s.fork(len(facts))
    forks += lambda i: f"Fact {i + 1}: {facts[i]}\n"
    forks.join(mode="concate_and_append")
    s += "Question: " + question + "\n"
    s += "Answer:" + sgl.gen("answer", max_tokens=24, stop="\n")


@sgl.function
def image_qa(s: State, picture: Any, question: str) -> None:
    """A picture in a user's turn."""
    s += sgl.user(sgl.image(picture) + question)
    s += sgl.assistant(sgl.gen("answer"))


@sgl.function
def image_choice(s: State, picture: Any) -> None:
    """A picture, and a choice about it."""
    s += sgl.user(sgl.image(picture) + "What colour is the circle?")
    s += sgl.assistant(sgl.select("colour", ["Blue", "Red", "Green"]))


@sgl.function
def stream(s: State, question: str) -> None:
    """A chat whose answer is read as it comes."""
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=24))


@sgl.function
def regex(s: State) -> None:
    """An answer of a given pattern."""
    s += "Q: Which address does a computer call itself by?\n"
    s += "A: " + sgl.gen("answer", temperature=0, regex=IP_ADDRESS)


@sgl.function
def fork(s: State, colours: list[str]) -> None:
    """Forks that end in different places; their parent reads them and goes on."""
    s += "Things and their colours.\n"
    forks = s.fork(len(colours))
    for each, colour in zip(forks, colours, strict=True):
        each += f"Something {colour} is the" + sgl.gen("thing", max_tokens=6, stop=["\n", "."])
    for each in forks:
        s += "Also: the" + each["thing"] + ".\n"
    with s.copy() as aside:
        aside += "Nobody will read this:" + sgl.gen("aside", max_tokens=4)
    s += "The end." + sgl.gen("after", max_tokens=4)


def _character(s: State) -> None:
    s += "Make up a person in this form:\n"
    s += "Name: Ada Lovelace.\nBirthday: December 10, 1815.\nWork: mathematician.\n\n"
    s += "Another one, with Name, Birthday and Work.\n"
    s += "Name:" + sgl.gen("name", stop="\n", max_tokens=16) + "\nBirthday:" + sgl.gen("birthday", stop="\n", max_tokens=16)
    s += "\nWork:" + sgl.gen("work", stop="\n", max_tokens=16) + "\n"


character = sgl.function(_character)
completion_speculative = sgl.function(num_api_spec_tokens=48)(_character)


@sgl.function(num_api_spec_tokens=64)
def chat_completion_speculative(s: State) -> None:
    """Several nodes in one turn of a chat that can only be asked for whole turns."""
    s += sgl.system("You fill in forms.")
    s += sgl.user("Make up a person in this form: Name, Birthday, Work.")
    s += sgl.assistant("Name: Ada Lovelace.\nBirthday: December 10, 1815.\nWork: mathematician.\n")
    s += sgl.user("Another one, in the same form.")
    birthday, work = sgl.gen("birthday", stop="\n"), sgl.gen("work", stop="\n")
    s += sgl.assistant("Name:" + sgl.gen("name", stop="\n") + "\nBirthday:" + birthday + "\nWork:" + work)


@sgl.function
def min_new_tokens(s: State, least: int, most: int) -> None:
    """An answer that may not be short."""
    s += sgl.user("What is the capital of France? Answer with one word.")
    s += sgl.assistant(sgl.gen("answer", min_tokens=least, max_tokens=most))


@sgl.function
def hellaswag_select(s: State, beginning: str, endings: list[str]) -> None:
    """Which ending fits: examples, a beginning, a choice among sentences."""
    s += "Making tea: A woman fills a kettle and waits. When the water boils, she pours it over the tea leaves.\n\n"
    s += "Football: A boy runs towards the ball. He kicks it into the goal and his friends cheer.\n\n"
    s += beginning
    s += sgl.select("ending", choices=endings)


@sgl.function
def expand(s: State, tip: str) -> None:
    """A part of another program."""
    s += "More about " + tip + ":" + sgl.gen("more", max_tokens=8)


@sgl.function
def multi_function(s: State, topic: str) -> None:
    """A program that calls another one."""
    s += "A tip for " + topic + ":" + sgl.gen("tip", stop=["\n", ".", ":"], max_tokens=12)
    s += ".\n" + expand(tip=s["tip"])["more"]
    s += "\nIn summary" + sgl.gen("summary", max_tokens=8)
