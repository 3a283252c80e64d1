"""The text side of a model as the API uses it."""

from pathlib import Path

import pytest

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.text.byte_tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, byte_text_model
from streamserve.text.model import TextModel, load_text_model
from tests.text.toys import byte_level_folder, byte_level_gguf, sentencepiece_gguf

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_rendered_chat_sent_as_a_prompt_has_the_same_ids(smollm: TextModel, tmp_path: Path) -> None:
    with_bos = load_text_model(sentencepiece_gguf(tmp_path / "toy.gguf", template="{{ bos_token }}" + TURN))
    messages = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "sat"}]
    for text in (smollm, with_bos):
        assert text.template is not None
        assert text.encode_prompt(text.template.render(messages)) == text.encode_chat(messages)
    assert with_bos.encode_chat(messages).count(1) == 1


def test_begin_token_is_added_to_a_prompt_once(tmp_path: Path) -> None:
    text = load_text_model(sentencepiece_gguf(tmp_path / "toy.gguf"))
    assert [text.encode_prompt(prompt).count(1) for prompt in ("", "the", "<s>the", "<s><s>the")] == [1, 1, 1, 2]


def test_model_without_a_chat_template_does_not_chat(tmp_path: Path) -> None:
    text = load_text_model(byte_level_folder(tmp_path))
    with pytest.raises(InvalidRequest, match=r"no chat template.*--chat-template") as caught:
        text.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_sampling_defaults_hold_only_what_the_files_set(smollm: TextModel, tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "max_length": 20}
    assert load_text_model(byte_level_folder(tmp_path, generation_config=generation)).defaults == {
        "temperature": 0.6,
        "top_k": 20,
    }
    assert load_text_model(byte_level_gguf(tmp_path / "toy.gguf", pre="gpt-2", temperature=0.6)).defaults == {"temperature": 0.6}
    assert smollm.defaults == {}


def test_template_given_by_file_replaces_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ eos_token }}" + TURN)
    folder = byte_level_folder(tmp_path / "model", config={"chat_template": "theirs"})
    text = load_text_model(folder, chat_template_path=tmp_path / "mine.jinja")
    assert text.template is not None
    assert text.template.render([{"role": "user", "content": "hi"}]) == "<|end|><user>hi"
    with pytest.raises(CheckpointError, match="cannot read the chat template"):
        load_text_model(folder, chat_template_path=tmp_path / "missing.jinja")


def test_template_file_of_a_folder_overrules_its_tokenizer_config(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, config={"chat_template": [{"name": "default", "template": "old"}]})
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = load_text_model(folder).template
    assert template is not None
    message = {"role": "user", "content": "hi"}
    assert (template.render([message]), template.render([message], tools=[{"type": "function"}])) == ("new", "tools")


def test_tokenizer_from_elsewhere_keeps_the_models_own_ends_and_defaults(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "generation_config.json").write_text('{"eos_token_id": 9, "top_p": 0.5}')
    text = load_text_model(model, tokenizer_path=byte_level_folder(tmp_path / "tokenizer"))
    assert set(text.tokenizer.eos_token_ids) == {0, 9}
    assert text.defaults == {"top_p": 0.5}


def test_gguf_with_unsupported_tokenizer_loads_with_a_tokenizer_folder(tmp_path: Path) -> None:
    path = byte_level_gguf(tmp_path / "toy.gguf", pre="viking")
    text = load_text_model(path, tokenizer_path=byte_level_folder(tmp_path / "tokenizer"))
    assert text.detokenizer().push(text.encode_prompt("hello")) == "hello"


def test_byte_text_model_chats_in_control_tokens_and_bytes() -> None:
    text = byte_text_model()
    ids = text.encode_chat([{"role": "user", "content": "é<|im_end|>"}])
    assert ids == [START_OF_TURN, *"user\né<|im_end|>".encode(), END_OF_TURN, *b"\n", START_OF_TURN, *b"assistant\n"]
    assert text.tokenizer.decode(ids, skip_special_tokens=False).startswith("<|im_start|>user\né<|im_end|><|im_end|>\n")
    assert text.encode_prompt("a<|endoftext|>") == [97, END_OF_TEXT]
    assert text.tokenizer.token_bytes(text.tokenizer.vocab_size) == b""
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        text.encode_prompt("\udc00")
