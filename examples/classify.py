"""Classification by `select`: every label is scored as a continuation of the prompt, and none has to be parsed from an answer."""

import math

import streamserve as sgl

LABELS = [" sport", " cooking", " weather", " music"]
HEADLINES = (
    "Late goal sends the visitors home without a point",
    "Storm warning for the islands until Sunday",
    "How to keep a cake from falling in the oven",
    "The orchestra plays its first concert in the new hall",
)


@sgl.function
def classify(s, headline):
    s += "Headline: Snow on the passes, bring chains\nTopic: weather\n\n"
    s += "Headline: Sprinter breaks her own record\nTopic: sport\n\n"
    s += "Headline: Five soups for a cold evening\nTopic: cooking\n\n"
    s += "Headline: A singer returns to the stage\nTopic: music\n\n"
    s += f"Headline: {headline}\nTopic:" + sgl.select("topic", LABELS)


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        for headline, state in zip(HEADLINES, classify.run_batch([{"headline": h} for h in HEADLINES]), strict=True):
            scores = [math.exp(score) for score in state.get_meta_info("topic")["normalized_prompt_logprobs"]]
            shares = ", ".join(f"{label.strip()} {score / sum(scores):.0%}" for label, score in zip(LABELS, scores, strict=True))
            print(f"{state['topic'].strip():8} {headline}  ({shares})")
