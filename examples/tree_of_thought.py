"""Tree of thought: several ways to think about a question, each followed and judged; the best one answers.

Every fork starts from the question that its parent has read, so the model reads that once, however many branches there are.
"""

import streamserve as sgl

QUESTION = "A baker has 3 trays with 6 rolls on each tray. He sells 10 rolls. How many rolls does he have left?"
NUM_PLANS = 3


@sgl.function
def solve(s, question):
    s += sgl.system("You are a careful teacher. Think in short, plain steps.")
    s += sgl.user(question)
    plans = s.fork(NUM_PLANS)
    for plan in plans:
        plan += sgl.assistant("A plan: " + sgl.gen("plan", max_tokens=40, temperature=0.8, stop="\n"))
        plan += sgl.user("Follow your plan.")
        plan += sgl.assistant(sgl.gen("steps", max_tokens=80, temperature=0))
        plan += sgl.user("How good was that, from 1 to 9?")
        plan += sgl.assistant("I give it a " + sgl.gen("mark", regex="[1-9]", temperature=0))
    plans.join()  # the parent's variables are now lists: one plan, one mark for each branch
    best = max(range(NUM_PLANS), key=lambda i: int(s["mark"][i]))
    s["best"] = best
    s += sgl.assistant(s["steps"][best])
    s += sgl.user("So what is the answer? One number.")
    s += sgl.assistant("The answer is " + sgl.gen_int("answer", max_tokens=6))


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        state = solve.run(question=QUESTION)
        for i, (plan, mark) in enumerate(zip(state["plan"], state["mark"], strict=True)):
            print(f"{'*' if i == state['best'] else ' '} plan {i + 1}, mark {mark}: {plan.strip()}")
        print(state["steps"][state["best"]].strip())
        print("answer:", state["answer"])
