"""Tree of thought: several ideas, each thought on in a branch of its own and judged there; the best one goes on.

Every branch begins with what its parent has read, so the model reads that once, however many branches there are.
"""

import math

import streamserve as sgl

PROBLEM = "My tomato plants have yellow leaves."
NUM_IDEAS = 4


@sgl.function
def solve(s, problem):
    s += sgl.system("You are a gardener. You answer in one short sentence.")
    s += sgl.user(problem + " What could be the reason?")

    branches = s.fork(NUM_IDEAS)
    for branch in branches:
        branch += sgl.assistant("They may have" + sgl.gen("reason", max_tokens=24, temperature=0.9, stop=[".", ",", "\n"]) + ".")
        branch += sgl.user("What should I do about that?")
        branch += sgl.assistant("You should" + sgl.gen("step", max_tokens=24, temperature=0, stop=[".", ",", "\n"]) + ".")
        branch += sgl.user("Will that help? Answer yes or no.")
        branch += sgl.assistant(sgl.select("verdict", ["Yes", "No"]))

    def confidence(branch):
        yes, no = branch.get_meta_info("verdict")["normalized_prompt_logprobs"]
        return math.exp(yes) / (math.exp(yes) + math.exp(no))

    s["ideas"] = [(confidence(branch), branch["reason"].strip(), branch["step"].strip()) for branch in branches]
    _, reason, step = max(s["ideas"])
    s += sgl.assistant(f"They may have {reason}. You should {step}.")
    s += sgl.user("How do I do that?")
    s += sgl.assistant(sgl.gen("answer", max_tokens=48, temperature=0, stop="\n"))


if __name__ == "__main__":
    with sgl.Engine(random_seed=1) as engine:
        sgl.set_default_backend(engine)
        state = solve.run(problem=PROBLEM)
        for score, reason, step in sorted(state["ideas"], reverse=True):
            print(f"{score:.0%}  they may have {reason}: you should {step}")
        print("\n" + state["answer"].strip())
