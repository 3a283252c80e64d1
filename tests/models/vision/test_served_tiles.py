"""The whole way for families whose pictures stand in several runs, or see each other: PNGs in a chat over HTTP, to transformers'
answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamserve.media.picture import Picture
from tests.models.vision import test_gemma3 as gemma3
from tests.models.vision import test_idefics3 as idefics3
from tests.models.vision import test_internvl as internvl
from tests.models.vision.parity import ANSWER_LEN, greedy
from tests.models.vision.test_served import part_of, said, served

SAVE: dict[str, tuple[Callable[[Path], Any], list[Picture]]] = {
    "idefics3": (lambda folder: idefics3.save("idefics3", folder), idefics3.PIXELS),
    "gemma3": (gemma3.save, gemma3.PIXELS),
    "internvl": (lambda folder: internvl.save("internvl3", folder), internvl.PIXELS),
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image' %}MARKER{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", SAVE)
async def test_a_chat_about_pictures_is_answered_as_transformers_does(kind: str, tmp_path: Path) -> None:
    save, pictures = SAVE[kind]
    tiny = save(tmp_path)
    words = tiny.processor.tokenizer
    words.chat_template = TEMPLATE.replace("MARKER", tiny.family.marker)
    words.save_pretrained(tmp_path)
    turns: list[list[Any]] = [["What is ", 1, "this?"], [2, "And this, beside ", 3, "?"]]
    chat: list[Any] = []
    plain: list[Any] = []  # the same for transformers, whose pictures come by themselves
    async with served(tmp_path) as client:
        for turn in turns:
            shown = [part if isinstance(part, str) else pictures[part].pixels for part in turn]
            chat.append({"role": "user", "content": [part_of(part) for part in shown]})
            parts = [said(part) if isinstance(part, str) else {"type": "image"} for part in turn]
            plain.append({"role": "user", "content": parts})
            text = words.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
            inputs = tiny.processed(text, [1] if len(chat) == 1 else [1, 2, 3])
            ids = inputs.pop("input_ids")[0].tolist()
            got = await client.chat.completions.create(
                model="tiny",
                messages=chat,
                temperature=0,
                max_tokens=ANSWER_LEN,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert got.usage is not None and got.usage.prompt_tokens == len(ids)
            assert got.choices[0].model_extra is not None
            assert got.choices[0].model_extra["token_ids"] == greedy(tiny.model, ids, **inputs)
            chat.append({"role": "assistant", "content": "a"})
            plain.append({"role": "assistant", "content": [said("a")]})
