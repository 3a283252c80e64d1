"""Programs that talk to a model: SGLang's frontend language (Zheng et al. 2023, arXiv 2312.07104), with coroutines underneath.

    @function
    def tip(s, topic):
        s += user("A tip for " + topic) + assistant(gen("tip", max_tokens=32))

    tip.run(topic="sleep", backend=RuntimeEndpoint("http://localhost:30000"))["tip"]

A program is data on a queue (executor.py) that the background loop works through (interpreter.py); its function runs wherever it
was called (function.py). Back ends keep the promise in backend.py. Loading this package loads no back end.
"""

from streamserve.errors import ProgramEnded
from streamserve.lang.dtypes import REGEX_BOOL, REGEX_FLOAT, REGEX_INT, REGEX_STR
from streamserve.lang.expressions import (
    Expression,
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    image,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from streamserve.lang.function import Function, function
from streamserve.lang.group import ProgramStateGroup
from streamserve.lang.settings import flush_cache, get_server_info, global_config, set_default_backend
from streamserve.lang.state import ProgramState

__all__ = [
    "REGEX_BOOL",
    "REGEX_FLOAT",
    "REGEX_INT",
    "REGEX_STR",
    "Expression",
    "Function",
    "ProgramEnded",
    "ProgramState",
    "ProgramStateGroup",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "global_config",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "user",
    "user_begin",
    "user_end",
    "video",
]
