"""Questions about a picture. The default model has learnt to see drawings of plain shapes; name another one for photographs:

python image_question.py PICTURE [MODEL]
"""

import sys

from PIL import Image, ImageDraw

import streamserve as sgl

QUESTIONS = ("What is in this picture?", "What colour is the circle?", "What shape is the blue thing?")


def draw():
    """A red circle on the left, a blue square on the right."""
    picture = Image.new("RGB", (320, 240), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((30, 70, 130, 170), fill="#e01010")
    pen.rectangle((190, 70, 290, 170), fill="#1030e0")
    return picture


@sgl.function
def look(s, picture, questions):
    s += sgl.user(sgl.image(picture) + questions[0])
    s += sgl.assistant(sgl.gen("answer_0"))
    forks = s.fork(len(questions) - 1)  # the picture is encoded once, for all of them
    for fork, question in zip(forks, questions[1:], strict=True):
        fork += sgl.user(question)
        fork += sgl.assistant(sgl.gen("answer"))
    print(questions[0], s["answer_0"].strip(), sep="\n  ")
    for fork, question in zip(forks, questions[1:], strict=True):
        print(question, fork["answer"].strip(), sep="\n  ")


if __name__ == "__main__":
    picture = sys.argv[1] if len(sys.argv) > 1 else draw()
    with sgl.Engine(model_path=sys.argv[2] if len(sys.argv) > 2 else None) as engine:
        sgl.set_default_backend(engine)
        look.run(picture=picture, questions=QUESTIONS, temperature=0, max_new_tokens=40)
