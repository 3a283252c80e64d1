"""What the answers of typed nodes look like: `gen(dtype=int)` and its kin.

Owns the four types' names, regular expressions and stops, as SGLang has them. Knows no back end: each enforces them as it can.
"""

from collections.abc import Mapping
from types import MappingProxyType

REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r"\"[\w\d\s]*\""

REGEXES: Mapping[str, str] = MappingProxyType({"int": REGEX_INT, "float": REGEX_FLOAT, "bool": REGEX_BOOL, "str": REGEX_STR})
# A number goes on for as long as digits come: these end it.
STOPS: Mapping[str, tuple[str, ...]] = MappingProxyType({"int": (" ", "\n"), "float": (" ", "\n")})


def name_of(dtype: type | str | None) -> str | None:
    """A type's name, checked: int, float, bool or str, given as the type or as its name."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", repr(dtype))
    if name not in REGEXES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(REGEXES)}")
    return name
