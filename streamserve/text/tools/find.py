"""Tool formats by name, and the one that a model's chat template shows.

Owns the list of formats. A new one is a file beside this and a line here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from streamserve.errors import InvalidRequest
from streamserve.text.tools.deepseekv3 import DeepSeekV3
from streamserve.text.tools.format import Tool, ToolFormat
from streamserve.text.tools.glm45 import Glm45
from streamserve.text.tools.gpt_oss import GptOss
from streamserve.text.tools.hermes import Hermes
from streamserve.text.tools.kimi_k2 import KimiK2
from streamserve.text.tools.llama3 import Llama3
from streamserve.text.tools.mistral import Mistral
from streamserve.text.tools.pythonic import Pythonic
from streamserve.text.tools.qwen3_coder import Qwen3Coder

_MAKERS: Mapping[str, Callable[[Mapping[str, int]], ToolFormat]] = {
    "hermes": Hermes,
    "llama3": Llama3,
    "mistral": Mistral,
    "mistral_args": partial(Mistral, is_list=False),
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
    "deepseekv3": DeepSeekV3,
    "deepseekv31": partial(DeepSeekV3, is_fenced=False),
    "kimi_k2": KimiK2,
    "glm45": Glm45,
    "glm47": partial(Glm45, has_lines=False),
    "gpt_oss": GptOss,
}
_ALIASES: Mapping[str, str] = {"qwen25": "hermes", "qwen": "hermes", "qwen3": "hermes", "gpt-oss": "gpt_oss"}

# Told by texts that occur in the template's source; the first whose texts all do.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt_oss", ("<|channel|>", "commentary")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseekv3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseekv31", ("<｜tool▁calls▁begin｜>",)),
    ("glm45", ("<arg_key>", "</arg_key>\\n<arg_value>")),
    ("glm45", ("<arg_key>", "</arg_key>\n<arg_value>")),
    ("glm47", ("<arg_key>",)),
    ("qwen3_coder", ("<function=",)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("[func_name1(params_name1=params_value1",)),
    ("llama3", ('{"name": function name, "parameters":',)),
    ("pythonic", ("<|python_start|>",)),
    ("llama3", ("<|python_tag|>",)),
)


def names() -> tuple[str, ...]:
    """Names that `find` knows."""
    return (*_MAKERS, *_ALIASES)


def find(name: str, control: Mapping[str, int] | None = None) -> ToolFormat:
    """A format by its name. `control`: ids of the vocabulary's control tokens by their texts, which grammars need."""
    known = _ALIASES.get(name, name)
    if known not in _MAKERS:
        raise InvalidRequest(f"the tool format {name!r} is not known; allowed are {', '.join(names())}")
    return _MAKERS[known](control or {})


def auto(template: str | None, control: Mapping[str, int] | None = None) -> ToolFormat:
    """The format that a chat template's source shows. Hermes where it shows none: then `instructions` tell the model of it."""
    for name, signs in _SIGNS:
        if template is not None and all(sign in template for sign in signs):
            return find(name, control)
    return find("hermes", control)


def instructions(tools: Sequence[Tool]) -> str:
    """A system text that describes tools and Hermes' way of calling them, for models whose template leaves tools out."""
    described = "\n".join(_described(tool) for tool in tools)
    return (
        "You may call functions to help with the user's request. These are their signatures, between <tools> and </tools>:\n"
        f"<tools>\n{described}\n</tools>\n\n"
        "To call one, answer with its name and arguments as JSON between <tool_call> and </tool_call>:\n"
        '<tool_call>\n{"name": <function name>, "arguments": <JSON object of arguments>}\n</tool_call>'
    )


def _described(tool: Tool) -> str:
    parameters = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)
