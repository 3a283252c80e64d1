"""What the bench of speculation makes of answers, and which of its checks notice what."""

from dataclasses import replace
from random import Random

import pytest

from bench.counters import Counts, Plan, Sent, exact_checks, loose_checks, plans, said
from bench.edits import copied_share, edits
from bench.speculative import Comparison, Prompt, tell, verdict
from streamserve.benchmark.answers import Answer


def answer(text: str, *, tokens: int, sent_s: float = 0.0, takes_s: float = 1.0, accepted: int = 0, drafted: int = 0) -> Answer:
    return Answer(
        sent_s, (sent_s + takes_s / 2, sent_s + takes_s), 5, tokens, text=text, num_accepted=accepted, num_drafted=drafted
    )


def test_every_edit_is_another_question_about_a_text_of_some_length() -> None:
    made = edits()
    assert len(made) == len({edit.question for edit in made}) == 50
    assert {edit.kind for edit in made} == {"prose", "code", "data", "table"}
    assert all(len(edit.text) > 200 and edit.text in edit.question for edit in made)


def test_a_copy_is_told_from_an_answer_about_the_text() -> None:
    text = "The library on Mill Street opens at nine on Monday and closes at six."
    assert copied_share(text, text) == 1.0
    assert copied_share(text, text.replace("Monday", "Friday")) > 0.8
    assert copied_share(text, "Here it is:\n\n" + text.replace(" ", "\n")) == 1.0, "layout does not matter"
    assert copied_share(text, "It opens on Monday, and it closes at some time: at six.") < 0.3
    assert copied_share(text, "") == 0.0


def test_rates_are_those_of_all_turns_together_and_ratios_those_of_each() -> None:
    found = Comparison(("none", "ngram"))
    turn = {
        "none": [answer("a", tokens=10, takes_s=1.0), answer("b", tokens=30, takes_s=3.0)],
        "ngram": [
            answer("a", tokens=10, takes_s=0.5, accepted=6, drafted=8),
            answer("b", tokens=30, takes_s=1.5, accepted=14, drafted=30),
        ],
    }
    found.add(0, turn, at_once=1)
    found.add(0, {**turn, "ngram": turn["none"]}, at_once=1)
    assert found.ratios == [2.0, 1.0]
    assert found.ratio == pytest.approx(8 / 6)
    assert found.ratio_of([1]) == pytest.approx(60 / 4.5 / 10)
    assert found.sums["ngram"].figures()["tokens_per_row"] == 80 / 60
    assert found.sums["none"].later_rate == pytest.approx(76 / 4)
    together = Comparison(("none", "ngram"))
    together.add(
        0, {"none": turn["none"], "ngram": [replace(one, sent_s=0.0, events_s=(3.0,)) for one in turn["ngram"]]}, at_once=2
    )
    assert together.ratio == 1.0, "side by side the time of the last one counts"


def test_texts_that_differ_between_ways_or_rounds_are_not_equal() -> None:
    found = Comparison(("none", "ngram"))
    same, other = answer("same", tokens=1), answer("other", tokens=1)
    found.add(0, {"none": [same, same], "ngram": [same, other]}, at_once=1)
    assert (found.num_equal, len(found.texts)) == (1, 2)
    prompts = [Prompt("prose", [1], "same"), Prompt("code", [2], "same")]
    assert "same text from both: 1 of 2" in tell(found, prompts, "edit", 1.8) and "SHORT" in tell(found, prompts, "edit", 1.8)


def test_a_bound_is_met_from_its_own_side() -> None:
    assert verdict(1.8, 1.8).endswith("ok") and verdict(1.79, 1.8).endswith("SHORT")
    assert verdict(0.6, 0.6, is_at_most=True).endswith("ok") and verdict(0.61, 0.6, is_at_most=True).endswith("SHORT")


def sent(tokens: int, accepted: int, rejected: int, *, came: int | None = None) -> Sent:
    one = Sent()
    one.take({"choices": [{"token_ids": [1] * (tokens if came is None else came), "finish_reason": "length"}]})
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected, "jumped_tokens": 1}
    one.take({"choices": [], "usage": {"completion_tokens": tokens, "completion_tokens_details": details}})
    return one


def test_a_token_too_many_or_too_few_anywhere_is_noticed() -> None:
    made = plans(2, Random(0), are_exact=True)
    answers = [sent(5, 2, 3), sent(7, 0, 1)]
    right = said(answers)
    assert right == Counts(12, 6, 2, 2)
    assert all(exact_checks(made, answers, right).values())
    for wrong in (Counts(13, 6, 2, 2), Counts(12, 5, 2, 2), Counts(12, 6, 3, 2), Counts(12, 6, 2, 1)):
        assert not all(exact_checks(made, answers, wrong).values()), wrong
    assert all(exact_checks(made, answers, replace(right, jumped=3)).values()), "forced for an answer that nobody was sent"
    assert not all(exact_checks(made, [sent(5, 2, 3, came=4), answers[1]], right).values())
    assert not all(exact_checks(made, [Sent(), answers[1]], said(answers[1:])).values())
    assert not all(exact_checks(made, [Sent(error="503"), answers[1]], said(answers[1:])).values())
    for enough in (right, Counts(14, 9, 4, 3)):
        assert all(loose_checks(made, answers, enough).values()), enough
    for too_few in (Counts(11, 9, 4, 3), Counts(14, 5, 4, 3), Counts(14, 9, 1, 3)):
        assert not all(loose_checks(made, answers, too_few).values()), too_few


def test_exact_requests_neither_hang_up_nor_stop_early() -> None:
    rng = Random(1)
    exact, loose = plans(200, rng, are_exact=True), plans(200, rng, are_exact=False)
    assert not any(plan.hangs_up or "stop" in plan.body for plan in exact)
    assert all(plan.hangs_up or "stop" in plan.body for plan in loose)
    for wire in ("stream", "whole", "socket"):
        of_wire = [plan for plan in exact if plan.wire == wire]
        assert {plan.cancels_after is None for plan in of_wire} == {True, False}
    assert len({plan.id for plan in (*exact, *loose)}) == 400
    assert all(isinstance(plan, Plan) and plan.most_tokens >= 1 for plan in exact)
