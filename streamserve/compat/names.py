"""Names of SGLang's language that are spelt otherwise here."""

from streamserve.lang.backend import Backend as BaseBackend
from streamserve.lang.group import ProgramStateGroup
from streamserve.lang.state import ProgramState

__all__ = ["BaseBackend", "ProgramState", "ProgramStateGroup"]
