"""Whether every value of a schema would have to contain another of the same kind, without end.

Owns that one question, for schemas as text/schema.py prepares them. It sees what must be there in any case: required
properties, items that there must be, all of allOf. Of several options it follows none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_PREFIX = "#/$defs/"


def endless(root: Any, definitions: Mapping[str, Any]) -> str | None:
    """The name of a definition that no finite value matches; None when none is seen."""
    needs = {name: [*_needs(schema)] for name, schema in definitions.items()}
    needs[""] = [*_needs(root)]
    done: set[str] = set()
    for start in ("", *definitions):
        open_ones: set[str] = set()
        path = [(start, iter(needs[start]))] if start not in done else []
        if path:
            open_ones.add(start)
        while path:
            name, rest = path[-1]
            following = next(rest, None)
            if following is None:
                path.pop()
                open_ones.discard(name)
                done.add(name)
            elif following in open_ones:
                return following
            elif following not in done and following in needs:
                open_ones.add(following)
                path.append((following, iter(needs[following])))
    return None


def _needs(schema: Any) -> Iterator[str]:
    """Definitions of which every value of the schema contains one."""
    waiting = [schema]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, Mapping) or "const" in found or "enum" in found:
            continue
        if "$ref" in found:
            yield found["$ref"].removeprefix(_PREFIX)
        waiting += found.get("allOf", ())
        for key in ("anyOf", "oneOf"):
            waiting += found[key] if len(found.get(key, ())) == 1 else ()
        if found.get("type") in ("object", ["object"]):
            properties = found.get("properties", {})
            waiting += [properties.get(name, found.get("additionalProperties")) for name in found.get("required", ())]
        elif found.get("type") in ("array", ["array"]) and found.get("minItems", 0) > 0:
            first = found.get("prefixItems") or found.get("items")
            waiting += first[: found["minItems"]] if isinstance(first, list) else [first]
