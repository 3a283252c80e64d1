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
EXAMPLE = "Hi, this is Joe from Boston. I am 45 years old, and I look after sick people in a hospital."
FACTS = '{"name":"Joe","city":"Boston","age":45,"job":"doctor"}'  # without spaces, as JSON under a schema is written
LETTERS = (
    "Dear Sir, my name is Maria Lopez. I am 34 years old, I live in Lisbon and I teach mathematics to children.",
    "Hello from Osaka! I am Ken, 51 years old, and I fly airplanes.",
    "Greetings from Rome! I am Anna, 28 years old, and I bake bread for the whole street.",
)


@sgl.function
def extract(s, letter):
    s += sgl.system("You take facts out of letters and write them down as JSON.")
    s += sgl.user(EXAMPLE) + sgl.assistant(FACTS)
    s += sgl.user(letter)
    s += sgl.assistant(sgl.gen("facts", json_schema=SCHEMA, max_tokens=80, temperature=0))


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        for state in extract.run_batch([{"letter": letter} for letter in LETTERS]):
            facts = json.loads(state["facts"])
            print(f"{facts['name']:12} {facts['age']:3}  {facts['job']:8} {facts['city']}")
