"""--speculative: its spellings, those of others, and what is refused before any weight is read."""

import pytest

from streamserve.errors import ConfigError
from streamserve.speculative import MAX_DRAFTS, Speculative, read_speculative


@pytest.mark.parametrize(
    "text, read",
    [
        ("auto", Speculative("auto", None, 12)),
        ("auto,5", Speculative("auto", None, 5)),
        ("none", Speculative("none")),
        ("ngram", Speculative("ngram", None, 12)),
        ("ngram,16", Speculative("ngram", None, 16)),
        ("ngram_shared, 3", Speculative("ngram_shared", None, 3)),
        ("auto, 3", Speculative("auto", None, 3)),
        ("mtp", Speculative("mtp", None, 4)),
        ("draft_model=/models/small", Speculative("draft_model", "/models/small", 4)),
        ("draft_model=org/name,6", Speculative("draft_model", "org/name", 6)),
        ("eagle=a,b=c,2", Speculative("eagle", "a,b=c", 2)),  # the first = and the last number count
        ("NGRAM", Speculative("ngram", None, 12)),  # SGLang's --speculative-algorithm
        ("EAGLE3=head", Speculative("eagle", "head", 4)),
        ("NEXTN", Speculative("mtp", None, 4)),
        ("STANDALONE=small", Speculative("draft_model", "small", 4)),
        ('{"method": "ngram", "num_speculative_tokens": 5}', Speculative("ngram", None, 5)),  # vLLM's --speculative-config
        ('{"method": "eagle3", "model": "org/head"}', Speculative("eagle", "org/head", 4)),
        ('{"method": "mimo_mtp", "num_speculative_tokens": 1}', Speculative("mtp", None, 1)),
    ],
)
def test_every_spelling_is_read(text: str, read: Speculative) -> None:
    assert read_speculative(text) == read


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "allowed is auto, none, ngram"),
        ("medusa", "allowed is auto, none, ngram"),
        ("ngram,0", f"allowed is 1 to {MAX_DRAFTS}"),
        ("ngram,-2", f"allowed is 1 to {MAX_DRAFTS}"),
        (f"mtp,{MAX_DRAFTS + 1}", f"allowed is 1 to {MAX_DRAFTS}"),
        ("ngram,many", "allowed is auto"),
        ("ngram=x", "ngram takes no path"),
        ("eagle", "give eagle=PATH"),
        ("draft_model=,4", "give draft_model=PATH"),
        ("none,4", "none makes no guesses"),
        ('{"method": "ngram"', "begins as JSON"),
        ('{"method": "ngram", "prompt_lookup_max": 4}', "prompt_lookup_max has no meaning here"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "whole number"),
        ('{"model": "x"}', "method (text) is needed"),
    ],
)
def test_what_cannot_be_is_refused_with_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_speculative(text)
    assert said in str(refused.value) and repr(text) in str(refused.value)
