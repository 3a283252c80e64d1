"""A chat that shows its answers word by word, as an `async` program: `await s.gen(...)` returns when the answer is there.

Ask your own questions: python streaming_chat.py "What is a comet?" "And a meteor?"
"""

import asyncio
import sys

import streamserve as sgl

QUESTIONS = ("What is a volcano?", "Name a famous one.")


@sgl.function
async def chat(s, questions):
    s += sgl.system("You are friendly, and you answer in one or two sentences.")
    for i, question in enumerate(questions):
        s += sgl.user(question)
        with s.assistant():
            await s.gen(f"answer_{i}", max_tokens=100)


async def main(questions):
    async with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        state = await chat.async_run(questions=questions, temperature=0, stream=True)
        for i, question in enumerate(questions):
            print(f"\n> {question}")
            async for piece in state.text_async_iter(f"answer_{i}"):
                print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:] or QUESTIONS))
