"""The offline front: a model in this process, without a server. `Engine` in SGLang's shapes, `LLM` in vLLM's."""

from streamserve.llm.engine import Engine
from streamserve.llm.llm import LLM
from streamserve.llm.sampling import SamplingParams

__all__ = ["LLM", "Engine", "SamplingParams"]
