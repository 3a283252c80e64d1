"""Facts out of a text, as JSON of a given schema: whatever the model writes, it can be parsed."""

import json

import streamserve as sgl

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "city": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "job": {"enum": ["baker", "doctor", "teacher", "pilot"]},
    },
    "required": ["name", "city", "age", "job"],
    "additionalProperties": False,
}
LETTERS = (
    "Dear Sir, my name is Maria Lopez. I am 34 years old, I live in Lisbon and I teach mathematics to children.",
    "Hello! I'm Ken, 51, and I have flown airplanes out of Osaka for half of my life.",
    "Greetings from Vienna. Anna here, 28. I get up at three every morning to bake bread for the whole street.",
)


@sgl.function
def extract(s, letter):
    s += sgl.system("You take facts out of letters and write them down as JSON.")
    s += sgl.user(letter)
    s += sgl.assistant(sgl.gen("facts", json_schema=json.dumps(SCHEMA), max_tokens=80, temperature=0))


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        for state in extract.run_batch([{"letter": letter} for letter in LETTERS]):
            facts = json.loads(state["facts"])
            print(f"{facts['name']:12} {facts['age']:3}  {facts['job']:8} {facts['city']}")
