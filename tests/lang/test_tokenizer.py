"""What scripts ask `get_tokenizer()` for: transformers' methods, answered by the server."""

from typing import Any

import numpy as np
import pytest

from streamserve import LLM, Engine
from tests.text.conftest import load_reference

TEXTS = ["Hello, world!", " naïve — 東京 👍", "<|im_start|>user\n"]
CHAT = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return load_reference()


def test_it_says_what_transformers_says(engine: Engine, theirs: Any) -> None:
    ours = engine.get_tokenizer()
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours.decode(np.array(ids)) == theirs.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) != text
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids
    assert ours(TEXTS[0])["attention_mask"] == theirs(TEXTS[0])["attention_mask"]
    assert ours.batch_decode(ours(TEXTS).input_ids) == TEXTS
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert (ours.bos_token, ours.bos_token_id, len(ours)) == (theirs.bos_token, theirs.bos_token_id, len(theirs))


@pytest.mark.parametrize("how", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}])
def test_it_writes_chats_as_transformers_does(how: dict[str, bool], engine: Engine, theirs: Any) -> None:
    ours = engine.get_tokenizer()
    whole = theirs.apply_chat_template(CHAT, tokenize=False, **how)
    assert ours.apply_chat_template(CHAT, tokenize=False, **how) == whole
    assert ours.apply_chat_template(CHAT, **how) == theirs.encode(whole)


def test_a_script_writes_its_prompts_with_it() -> None:
    with LLM(fake=True, fake_step_ms=0) as llm:
        tokenizer = llm.get_tokenizer()
        prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
        (output,) = llm.generate(prompt)
        assert output.prompt_token_ids == tokenizer.encode(prompt) == llm.chat(CHAT[:1])[0].prompt_token_ids
        assert tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) == output.outputs[0].text
        assert tokenizer.bos_token is tokenizer.bos_token_id is None and tokenizer.eos_token_id == 258
        assert tokenizer.model_max_length == 8192 and "message" in str(tokenizer.chat_template)
        assert not hasattr(tokenizer("a"), "pixel_values")
