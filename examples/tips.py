"""A skeleton and its parts at once: first short tips, one behind the other, then all of them expanded side by side.

Written one after the other the paragraphs would take as many steps as they have words together; as forks they take as many as
the longest one has.
"""

import streamserve as sgl

NUM_TIPS = 4


@sgl.function
def advise(s, topic):
    s += sgl.user(f"Give me {NUM_TIPS} short tips for {topic}.")
    s += sgl.assistant_begin()
    for i in range(NUM_TIPS):
        s += f"{i + 1}." + sgl.gen(f"tip_{i}", max_tokens=16, stop=["\n", ".", ","]) + ".\n"
    s += sgl.assistant_end()
    forks = s.fork(NUM_TIPS)
    for i, fork in enumerate(forks):
        fork += sgl.user(f"Why is tip {i + 1} good advice? One sentence.")
        fork += sgl.assistant(s[f"tip_{i}"].strip() + ", because" + sgl.gen("reason", max_tokens=40, stop=[".", "\n"]))
    for i, fork in enumerate(forks):
        print(f"{i + 1}.{s[f'tip_{i}']}, because{fork['reason']}.")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        advise.run(topic="a good night's sleep", temperature=0)
