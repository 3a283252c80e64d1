"""Whether two JSON schemas exclude each other: no value matches both. Then oneOf means what anyOf means.

Owns that one question. It says True only when it is certain; what it cannot see is no proof.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_MAX_DEPTH = 8
_MAX_STEPS = 20_000

Resolve = Callable[[Any], Any]


def first_overlap(options: Sequence[Any], resolve: Resolve) -> tuple[int, int] | None:
    """Two of the options that one value may match at once, as far as can be seen; None when all exclude each other.

    `resolve` gives what a $ref points to. What takes too many steps to tell counts as overlapping.
    """
    given = [option if isinstance(option, Mapping) else {} for option in options]
    for values in (map(_values, given), *(_of_property(given, name, resolve) for name in _shared(given))):
        listed = list(values)
        if len(listed) > 1 and None not in listed:  # thousands of options are told apart in one pass
            owner: dict[Any, int] = {}
            clash = next((n for n, some in enumerate(listed) if _clashes(owner, n, some or ())), None)
            if clash is None:
                return None
    proof = _Proof(resolve)
    return next(((a, b) for b in range(len(options)) for a in range(b) if not proof.are_disjoint(options[a], options[b])), None)


def _shared(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Properties that every option requires."""
    required = [{name for name in _list(option.get("required")) if isinstance(name, str)} for option in options]
    return sorted(set.intersection(*required))[:8] if required else []


def _of_property(options: Sequence[Mapping[str, Any]], name: str, resolve: Resolve) -> Iterator[list[Any] | None]:
    """The values that each option, an object, allows for a property."""
    for option in options:
        found = _property(option, name)
        if isinstance(found, Mapping) and set(found) == {"$ref"}:
            found = resolve(found["$ref"])
        yield _values(found) if isinstance(found, Mapping) and _types(option) == {"object"} else None


def _clashes(owner: dict[Any, int], n: int, values: Sequence[Any]) -> bool:
    """Whether another option has one of the values; they are this one's otherwise."""
    return any(owner.setdefault(_key(value), n) != n for value in values)


class _Proof:
    """Counts its steps, so that no schema takes for ever."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._num_steps = 0

    def are_disjoint(self, a: Any, b: Any, depth: int = 0) -> bool:
        """Whether no value matches both."""
        self._num_steps += 1
        if a is False or b is False:
            return True
        if depth > _MAX_DEPTH or self._num_steps > _MAX_STEPS or not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        return self._excludes(a, b, depth) or self._excludes(b, a, depth) or self._differ(a, b, depth)

    def _excludes(self, a: Mapping[str, Any], b: Mapping[str, Any], depth: int) -> bool:
        """Whether a part of `a`, whatever stands beside it, excludes `b`."""
        if "$ref" in a and self.are_disjoint(self._resolve(a["$ref"]), b, depth + 1):
            return True
        if any(self.are_disjoint(part, b, depth + 1) for part in _list(a.get("allOf"))):
            return True
        return any(
            bool(options := _list(a.get(key))) and all(self.are_disjoint(option, b, depth + 1) for option in options)
            for key in ("anyOf", "oneOf")
        )

    def _differ(self, a: Mapping[str, Any], b: Mapping[str, Any], depth: int) -> bool:
        """Whether the keywords of both themselves exclude each other."""
        values_a, values_b = _values(a), _values(b)
        if values_a is not None and values_b is not None:
            return not set(map(_key, values_a)) & set(map(_key, values_b))
        common = _types(a) & _types(b)
        if common == {"object"}:
            needed = {name for name in (*_list(a.get("required")), *_list(b.get("required"))) if isinstance(name, str)}
            return any(self.are_disjoint(_property(a, name), _property(b, name), depth + 1) for name in sorted(needed))
        return common <= {"integer", "number"} and (not common or _is_below(a, b) or _is_below(b, a))


def _property(schema: Mapping[str, Any], name: str) -> Any:
    """What a schema says of one property; True when it says nothing, or not simply."""
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return True if schema.get("patternProperties") else schema.get("additionalProperties", True)


def _is_below(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    high, low = a.get("maximum"), b.get("minimum")
    return isinstance(high, int | float) and isinstance(low, int | float) and high < low


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that alone may match, if the schema lists them."""
    if "const" in schema:
        return [schema["const"]]
    return _list(schema["enum"]) if "enum" in schema else None


def _types(schema: Mapping[str, Any]) -> set[str]:
    """Types that may match, whole numbers apart from others."""
    given = schema.get("type")
    names = set(given) if isinstance(given, list) else {given} if isinstance(given, str) else set(_ALL)
    if "number" in names:
        names.add("integer")
    values = _values(schema)
    return names if values is None else names & {_type(value) for value in values}


_ALL = ("null", "boolean", "integer", "number", "string", "array", "object")


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if value == int(value) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _key(value: Any) -> Any:
    """Equal for values that are equal as JSON, and hashable."""
    if isinstance(value, Mapping):
        return ("object", frozenset((name, _key(item)) for name, item in value.items()))
    if isinstance(value, list):
        return ("array", *map(_key, value))
    return (_type(value) if isinstance(value, bool) else "", value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
