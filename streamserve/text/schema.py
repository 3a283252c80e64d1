"""JSON schemas made ready for a grammar: what a grammar cannot hold is refused by its path, the rest is bounded and tidied.

Owns which keywords there are, what is done with each, and the limits on a schema's size. Knows nothing of requests; what it makes
is a schema that llguidance reads as JSON Schema 2020-12, with every reference inside it.

Time is linear in the schema's size and stops at the limits, at most about 0.3 s: give schemas of more than `LARGE_CHARS` to a
worker thread.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import Any, NoReturn
from urllib.parse import unquote

from streamserve.errors import InvalidRequest
from streamserve.text.disjoint import first_overlap
from streamserve.text.finite import endless
from streamserve.text.pattern import fault_of, plainer

MAX_NODES = 30_000
MAX_CHARS = 2_000_000
MAX_DEPTH = 50  # of schemas; the compiler reads JSON that is nested 127 deep
MAX_VALUE_DEPTH = 115  # of constants, with the schemas around them, as JSON
MAX_REPEAT = 100_000
LARGE_CHARS = 50_000

# Free JSON is nested at most this deep, and its numbers have at most so many digits: a model that goes on and on ends by itself.
MAX_FREE_DEPTH = 12
MAX_INTEGER = 2**63 - 1024  # the largest that a double holds exactly below 2**63
MAX_NUMBER = 10**15
NUMBER_STEP = 1e-10

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# What OpenAPI and pydantic write beside numbers and strings; of these only int32 says anything that a grammar can hold.
_PLAIN_FORMATS = (
    *("int32", "int64", "float", "double", "password", "byte", "binary", "unknown"),
    *("path", "file-path", "directory-path"),
)

# Say nothing about what is valid.
_ANNOTATIONS = frozenset(
    (
        *("$schema", "$id", "id", "$anchor", "$defs", "definitions", "$comment", "$vocabulary"),
        *("title", "description", "default", "examples", "example", "readOnly", "writeOnly", "deprecated"),
        *("contentMediaType", "contentEncoding", "contentSchema", "externalDocs", "xml", "discriminator"),
    )
)
_UNSUPPORTED = frozenset(
    (
        *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
        *("not", "if", "then", "else", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies"),
        *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "extends", "disallow", "divisibleBy"),
        *("x-guidance", "nullable"),
    )
)
_SCALARS = {"null", "boolean", "integer", "number", "string"}
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_SUPPORTED = frozenset(
    (
        *_IN_PLACE,
        *_NUMBERS,
        *_COUNTS,
        *("const", "enum", "type", "items", "additionalItems", "prefixItems", "properties", "additionalProperties"),
        *("patternProperties", "required", "pattern", "format", "multipleOf"),
    )
)
_KEYWORDS = sorted(_SUPPORTED | _UNSUPPORTED)
_PLAIN_KEY = re.compile(r"[A-Za-z_$][\w$-]*")
_MAX_DEPENDENCIES = 4


def prepare(schema: Any, path: str, *, closes_objects: bool = False) -> Any:
    """The schema as a grammar's compiler wants it: everything it says is held, or InvalidRequest names the key and its path.

    `path` names the schema in the request. `closes_objects`: objects that list their properties take no others, where the schema
    leaves that open (a narrower schema, right for calls of functions).
    """
    return _Walk(schema, path, closes_objects).result()


class _Walk:
    """One schema on its way through. Definitions are walked when something refers to them, and once."""

    def __init__(self, root: Any, path: str, closes_objects: bool) -> None:
        self._root = root
        self._path = path
        self._closes_objects = closes_objects
        self._num_nodes = 0
        self._num_chars = 0
        self._depth = 0
        self._name_of: dict[tuple[str, bool], str] = {}  # of definitions, by their pointer and whether they are joined
        self._scalars: dict[str, str] = {}  # names of definitions, by their text
        self._path_of: dict[str, str] = {}  # of definitions, by their name
        self._waiting: list[tuple[str, Any, str, bool]] = []
        self._needs_free = False
        self._places: dict[str, tuple[Any, str]] | None = None

    def result(self) -> Any:
        """The prepared schema."""
        found = self._schema(self._root, self._path, is_joined=False)
        definitions: dict[str, Any] = {}
        while self._waiting:
            name, target, path, is_joined = self._waiting.pop()
            self._path_of[name] = path
            definitions[name] = self._schema(target, path, is_joined=is_joined, is_definition=True)
        if (culprit := endless(found, definitions)) is not None:
            path = self._path_of.get(culprit, self._path)
            raise _refusal(f"{path} is matched by no finite value: it must contain itself; leave it out of required", path)
        definitions |= {name: json.loads(text) for text, name in self._scalars.items()}
        if self._needs_free:
            definitions |= free_json()
        if not definitions:
            return found
        return {**found, "$defs": definitions} if isinstance(found, dict) else found

    # One schema

    def _schema(self, schema: Any, path: str, *, is_joined: bool, is_definition: bool = False) -> Any:
        """`is_joined`: other schemas speak of the same value, so this one must not be rewritten as if it stood alone. Of a
        definition that holds for the value itself and not for what is in it: else every definition that it leads to would be
        another one too, and the compiler cannot follow a circle of those."""
        self._count(path)
        if isinstance(schema, bool):
            return self._free() if schema and not is_joined else schema
        if not isinstance(schema, Mapping):
            raise _refusal(f"{path} is {_shown(schema)}; a schema is an object or a boolean", path)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"{path} is nested {self._depth} schemas deep; at most {MAX_DEPTH} are allowed", path)
        out: dict[str, Any] = {}
        said = [key for key in schema if self._says_something(schema, key, path)]
        in_place = [key for key in said if key in _IN_PLACE]
        is_joined_here = bool(in_place) and len(set(said) - {"type"}) > 1  # a type leaves open what is inside
        is_inner_joined = is_joined_here or (is_joined and not is_definition)
        is_joined = is_joined or is_joined_here
        for key in said:
            out[key] = self._keyword(key, schema, f"{path}{_step(key)}", is_joined if key in _IN_PLACE else is_inner_joined)
        self._depth -= 1
        self._rewrite(out, schema, path, is_joined)
        if not out and not is_joined:
            return self._free()
        if not in_place:
            self._bound(out, is_joined)
            if not is_joined and len(out) > 1 and set(_types_of(out.get("type"))) <= _SCALARS:
                return self._shared(out)
        return out

    def _says_something(self, schema: Mapping[str, Any], key: Any, path: str) -> bool:
        """Whether the key is an assertion to hold; refuses those that cannot be held, drops those that say nothing."""
        if not isinstance(key, str):
            raise _refusal(f"{path} has the key {key!r}; keys are strings", path)
        if key in _SUPPORTED:
            return True
        if key in _ANNOTATIONS or (key.startswith(("x-", "$$")) and key != "x-guidance"):
            return False
        value, here = schema[key], f"{path}{_step(key)}"
        if key in _UNSUPPORTED:
            if not _is_empty(key, value, schema):
                raise _refusal(f"{here} is {_shown(value)}; {_why_not(key)}", here)
            return False
        near = get_close_matches(key, _KEYWORDS, n=1, cutoff=0.85) if 4 <= len(key) < 40 and key[0].isalpha() else []
        if near and near[0] not in schema:
            raise _refusal(f"{here} is no keyword of JSON Schema; did you mean {near[0]}?", here)
        return False  # a vocabulary of somebody's own: an annotation, as JSON Schema has it

    def _keyword(self, key: str, schema: Mapping[str, Any], path: str, is_joined: bool) -> Any:
        value = schema[key]
        if key in ("anyOf", "allOf", "oneOf"):
            return self._list(value, path, is_joined or key == "allOf")
        if key == "$ref":
            return self._reference(value, path, is_joined)
        if key in ("properties", "patternProperties"):
            return self._properties(key, value, path, is_joined)
        if key == "items" and isinstance(value, list):
            return [self._schema(item, f"{path}[{n}]", is_joined=is_joined) for n, item in enumerate(value)]
        if key == "prefixItems":
            return self._list(value, path, is_joined)
        if key in ("items", "additionalItems", "additionalProperties"):
            return self._schema(value, path, is_joined=is_joined)
        self._count(path, value)
        checks: Mapping[str, Callable[[Any, str], Any]] = {
            "type": _check_type,
            "enum": self._check_enum,
            "const": self._check_const,
            "required": _check_required,
            "pattern": _check_pattern,
            "multipleOf": _check_step,
        }
        if key in checks:
            return checks[key](value, path)
        if key in _COUNTS:
            return _check_count(value, path)
        if key in _NUMBERS:
            return _check_number(value, path)
        assert key == "format"
        return _check_format(value, path)

    def _list(self, value: Any, path: str, is_joined: bool) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise _refusal(f"{path} is {_shown(value)}; it must be a list of at least one schema", path)
        return [self._schema(item, f"{path}[{n}]", is_joined=is_joined) for n, item in enumerate(value)]

    def _properties(self, key: str, value: Any, path: str, is_joined: bool) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _refusal(f"{path} is {_shown(value)}; it must be an object of schemas", path)
        if key == "patternProperties":
            for pattern in value:
                _check_pattern(pattern, f"{path}{_step(pattern)}")
        found = {}
        for name, item in value.items():
            self._count(path, name)
            found[name] = self._schema(item, f"{path}{_step(name)}", is_joined=is_joined)
        return found

    # References

    def _reference(self, value: Any, path: str, is_joined: bool) -> str:
        """The definition's name. Where other schemas speak of the same value it is another one, for it must leave open what they
        may say: bounded twice, free values are multiplied with each other by the compiler."""
        if not isinstance(value, str):
            raise _refusal(f"{path} is {_shown(value)}; it must be a string", path)
        target, pointer = self._find(value, path)
        seen = {pointer}
        while isinstance(target, Mapping) and "$ref" in target and not set(target) & (_SUPPORTED - {"$ref"}):
            target, pointer = self._find(target["$ref"], path)
            if pointer in seen:
                raise _refusal(f"{path} is {value!r}, which refers to nothing but itself", path)
            seen.add(pointer)
        if (pointer, is_joined) not in self._name_of:
            word = re.sub(r"\W+", "_", pointer.rsplit("/", 1)[-1])[:40]
            name = self._name_of[pointer, is_joined] = f"{word}.{len(self._name_of)}"
            self._waiting.append((name, target, f"{self._path}{_dotted(pointer)}", is_joined))
        return f"#/$defs/{self._name_of[pointer, is_joined]}"

    def _find(self, reference: Any, path: str) -> tuple[Any, str]:
        """What a reference points to, and its place as a JSON pointer from the root."""
        text = unquote(str(reference))
        base, _, fragment = text.partition("#")
        own = self._root.get("$id", self._root.get("id")) if isinstance(self._root, Mapping) else None
        if (not base or base == str(own).rstrip("#")) and (not fragment or fragment.startswith("/")):
            return self._at_pointer(fragment, reference, path)
        place = self._named_places().get(text) or self._named_places().get(base or f"#{fragment}")
        if place is None:
            what = "another document, which is not fetched" if base else "no place in this schema"
            raise _refusal(f"{path} is {reference!r}, which refers to {what}; refer to #/$defs/...", path)
        if base and fragment.startswith("/"):
            return self._at_pointer(place[1] + fragment, reference, path)
        return place

    def _at_pointer(self, pointer: str, reference: Any, path: str) -> tuple[Any, str]:
        target = self._root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _refusal(f"{path} is {reference!r}; there is no such place in this schema", path) from None
        return target, pointer

    def _named_places(self) -> Mapping[str, tuple[Any, str]]:
        """Parts of the schema that have an $id or an $anchor."""
        if self._places is None:
            self._places = {}
            waiting: list[tuple[Any, str]] = [(self._root, "")]
            while waiting:
                self._count(self._path)
                value, pointer = waiting.pop()
                if isinstance(value, Mapping):
                    for key in ("$id", "id"):
                        if isinstance(value.get(key), str):
                            self._places.setdefault(value[key].rstrip("#") or "#", (value, pointer))
                    if isinstance(value.get("$anchor"), str):
                        self._places.setdefault(f"#{value['$anchor']}", (value, pointer))
                    children = value.items()
                    waiting += [(v, f"{pointer}/{str(k).replace('~', '~0').replace('/', '~1')}") for k, v in children]
                elif isinstance(value, list):
                    waiting += [(item, f"{pointer}/{n}") for n, item in enumerate(value)]
        return self._places

    # What is written otherwise, with the same meaning

    def _rewrite(self, out: dict[str, Any], schema: Mapping[str, Any], path: str, is_joined: bool) -> None:
        if "oneOf" in out:
            self._rewrite_one_of(out, schema, path)
        if isinstance(names := schema.get("propertyNames"), Mapping) and {"pattern", "enum", "$ref"} & set(names):
            self._rewrite_names(out, names, path, is_joined)
        for key in ("dependentRequired", "dependencies"):
            if schema.get(key):
                self._rewrite_dependencies(out, schema[key], f"{path}.{key}")
        if "not" in schema:
            away = _types_of(schema["not"]["type"])
            kept = [name for name in _types_of(out.get("type")) if name not in away]
            if not kept:
                raise _refusal(f"{path}.not is {_shown(schema['not'])}; it leaves no value that is allowed", path)
            out["type"] = kept
        if schema.get("unevaluatedProperties") is False:
            out["additionalProperties"] = False

    def _rewrite_one_of(self, out: dict[str, Any], schema: Mapping[str, Any], path: str) -> None:
        """Of options that exclude each other, any is as good as one. Options {"required": [name]} forbid each other."""
        options = schema["oneOf"]
        here = f"{path}.oneOf"
        needed = [_sole_requirement(option) for option in options]
        if len(options) > 1 and None not in needed and len(set(needed)) == len(needed):
            others = [{name: False for name in needed if name != own} for own in needed]
            found: list[Any] = [{"required": [own], "properties": rest} for own, rest in zip(needed, others, strict=True)]
        else:
            if (overlap := first_overlap([_beside(option, schema) for option in options], self._resolved)) is not None:
                a, b = overlap
                raise _refusal(
                    f"{here} has options [{a}] and [{b}] that one value may match at once; a grammar cannot hold that exactly "
                    "one matches: give each a property with its own const, or write anyOf",
                    here,
                )
            found = out["oneOf"]
        del out["oneOf"]
        if "anyOf" in out:
            out["allOf"] = [*out.get("allOf", ()), {"anyOf": found}]
        else:
            out["anyOf"] = found

    def _resolved(self, reference: Any) -> Any:
        return self._find(reference, self._path)[0]

    def _rewrite_names(self, out: dict[str, Any], names: Mapping[str, Any], path: str, is_joined: bool) -> None:
        """Names that a list holds, or a pattern matches: other properties go, and those that have no schema of their own get that
        of additional ones."""
        here = f"{path}.propertyNames"
        if is_joined or "patternProperties" in out:
            raise _refusal(f"{here} beside other schemas of the same object is not supported", here)
        if "$ref" in names:
            names = self._find(names["$ref"], f"{here}.$ref")[0]
            is_known = isinstance(names, Mapping) and _is_empty("propertyNames", names, {})
            if not is_known or not {"pattern", "enum"} & set(names):
                raise _refusal(f"{here} is {_shown(names)}; {_why_not('propertyNames')}", here)
        if "enum" in names:
            listed = [name for name in self._check_enum(names["enum"], f"{here}.enum") if isinstance(name, str)]
            own, other = out.get("properties", {}), out.get("additionalProperties", self._free())
            out["properties"] = {name: own.get(name, other) for name in listed if name in own or other is not False}
            out["additionalProperties"] = False
            return
        pattern = _check_pattern(names["pattern"], f"{here}.pattern")
        try:
            known = {name: item for name, item in out.get("properties", {}).items() if re.search(pattern, name)}
        except re.error:
            raise _refusal(f"{path}.propertyNames.pattern is {pattern!r}; it is not supported here", path) from None
        out["properties"] = known
        other = out.get("additionalProperties", self._free())
        if other is not False:
            out["patternProperties"] = {pattern: other}
        out["additionalProperties"] = False

    def _rewrite_dependencies(self, out: dict[str, Any], needs: Any, path: str) -> None:
        """A property that needs others: it is absent, or they are there."""
        if not isinstance(needs, Mapping) or not all(_is_names(names) for names in needs.values()):
            raise _refusal(f"{path} is {_shown(needs)}; lists of names are supported", path)
        if len(needs) > _MAX_DEPENDENCIES:
            raise _refusal(f"{path} has {len(needs)} entries; at most {_MAX_DEPENDENCIES} are allowed", path)
        pairs = [
            {"anyOf": [{"properties": {name: False}}, {"required": [name, *others]}]} for name, others in needs.items() if others
        ]
        if pairs:
            out["allOf"] = [*out.get("allOf", ()), *pairs]

    # Bounds

    def _shared(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A reference to the schema: the compiler takes a millisecond for a range of numbers each time that one is written."""
        name = self._scalars.setdefault(json.dumps(schema, sort_keys=True), f"scalar.{len(self._scalars)}")
        return {"$ref": f"#/$defs/{name}"}

    def _free(self) -> dict[str, Any]:
        self._needs_free = True
        return {"$ref": f"#/$defs/json.{MAX_FREE_DEPTH}"}

    def _bound(self, out: dict[str, Any], is_joined: bool) -> None:
        """Digits end, and so does nesting where the schema leaves everything open."""
        form = out.pop("format", None)
        if form in FORMATS:
            out["format"] = form
        if "const" in out or "enum" in out:
            return
        types = _types_of(out.get("type"))
        if "number" in types:
            _bound_number(out, MAX_NUMBER)
        elif "integer" in types:
            _bound_number(out, 2**31 - 1 if form == "int32" else MAX_INTEGER)
        if is_joined:
            return
        if "array" in types and "items" not in out and out.get("maxItems") != 0:
            out["items"] = self._free()
        elif "array" in types and isinstance(out.get("items"), list) and "additionalItems" not in out:
            out["additionalItems"] = self._free()
        if "object" in types and "additionalProperties" not in out and out.get("maxProperties") != 0:
            out["additionalProperties"] = False if self._closes_objects and self._lists_names(out) else self._free()

    def _lists_names(self, out: dict[str, Any]) -> bool:
        """Whether the object's properties are all named, so that it can be closed: also those that are required and no more."""
        named, patterns = out.get("properties"), out.get("patternProperties")
        unnamed = [name for name in out.get("required", ()) if name not in (named or ())]
        if unnamed and patterns:
            return False
        if unnamed and named is not None:
            out["properties"] = named | {name: self._free() for name in unnamed}
        return named is not None or bool(patterns)

    # Checks

    def _count(self, path: str, value: Any = None) -> None:
        """Counts nodes and characters; refuses what is too large, before time is spent on it."""
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self._num_nodes += 1
            if isinstance(item, str):
                self._num_chars += len(item)
            elif isinstance(item, Mapping):
                waiting += [*item, *item.values()]
            elif isinstance(item, list):
                waiting += item
            if self._num_nodes > MAX_NODES or self._num_chars > MAX_CHARS:
                raise _refusal(
                    f"{self._path} is too large: it has over {MAX_NODES:,} parts or {MAX_CHARS:,} characters", self._path
                )

    def _check_enum(self, value: Any, path: str) -> Any:
        if not isinstance(value, list) or not value:
            raise _refusal(f"{path} is {_shown(value)}; it must be a list of at least one value", path)
        return [self._check_const(item, f"{path}[{n}]") for n, item in enumerate(value)]

    def _check_const(self, value: Any, path: str, depth: int = 0) -> Any:
        if depth + 2 * self._depth > MAX_VALUE_DEPTH:
            raise _refusal(f"{path} is nested too deeply; at most {MAX_VALUE_DEPTH} levels of JSON are allowed", path)
        if isinstance(value, Mapping):
            return {name: self._check_const(item, path, depth + 1) for name, item in value.items()}
        if isinstance(value, list):
            return [self._check_const(item, path, depth + 1) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not -(2**53) <= value <= 2**53:
                raise _refusal(f"{path} is {value}; a number here must be within 2**53 of 0", path)
            return int(value) if value == int(value) else value  # 1.0 and 1 are one value, written as 1
        return value


def free_json() -> dict[str, Any]:
    """Definitions of any JSON value whose nesting is bounded: the outermost is `json.{MAX_FREE_DEPTH}`."""
    scalars: list[dict[str, Any]] = [{"type": "null"}, {"type": "boolean"}, {"type": "string"}, {"type": "number"}]
    _bound_number(scalars[3], MAX_NUMBER)
    found: dict[str, Any] = {"json.0": {"anyOf": scalars}}
    for level in range(1, MAX_FREE_DEPTH + 1):
        inner = {"$ref": f"#/$defs/json.{level - 1}"}
        found[f"json.{level}"] = {
            "anyOf": [
                {"$ref": "#/$defs/json.0"},
                {"type": "array", "items": inner},
                {"type": "object", "additionalProperties": inner},
            ]
        }
    return found


def free_object() -> dict[str, Any]:
    """A schema of any object, bounded as free JSON is."""
    inner = {"$ref": f"#/$defs/json.{MAX_FREE_DEPTH - 1}"}
    return {"type": "object", "additionalProperties": inner, "$defs": free_json()}


def _bound_number(out: dict[str, Any], limit: int) -> None:
    lows = [out[key] for key in ("minimum", "exclusiveMinimum") if isinstance(out.get(key), int | float)]
    highs = [out[key] for key in ("maximum", "exclusiveMaximum") if isinstance(out.get(key), int | float)]
    # A bound of the schema's own beyond the limit must not leave nothing between the two.
    if not lows:
        out["minimum"] = min(-limit, *(int(high) * 10 for high in highs)) if highs and min(highs) <= -limit else -limit
    if not highs:
        out["maximum"] = max(limit, *(int(low) * 10 for low in lows)) if lows and max(lows) >= limit else limit
    types = _types_of(out.get("type"))
    tiny = any(0 < abs(bound) < 1e-6 for bound in (*lows, *highs))
    if "number" in types and "multipleOf" not in out and not tiny:
        out["multipleOf"] = NUMBER_STEP


def _is_empty(key: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a keyword that grammars cannot hold says nothing here, or something that is written otherwise (see _rewrite)."""
    match key:
        case "uniqueItems":
            return value is False or bool(schema.get("maxItems") in (0, 1))
        case "then" | "else":
            return "if" not in schema
        case "if":
            return "then" not in schema and "else" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "nullable":
            return value is False
        case "propertyNames":
            if not isinstance(value, Mapping):
                return value is True
            said = {name for name in value if name in _SUPPORTED | _UNSUPPORTED}
            is_alone = said <= {"type", "pattern"} or said <= {"type", "enum"} or said == {"$ref"}
            return is_alone and bool(value.get("type", "string") == "string")
        case "unevaluatedItems":
            return _is_any(value)
        case "unevaluatedProperties":
            is_alone = not set(_IN_PLACE) & set(schema) and "additionalProperties" not in schema and "if" not in schema
            return _is_any(value) or (value is False and is_alone)
        case "dependentRequired" | "dependencies":
            return isinstance(value, Mapping) and all(_is_names(names) for names in value.values())
        case "dependentSchemas":
            return isinstance(value, Mapping) and not value
        case "not":
            return isinstance(value, Mapping) and set(value) == {"type"} and bool("integer" not in _types_of(value["type"]))
        case "$recursiveAnchor":
            return value is False
        case "$dynamicAnchor":
            return True  # without a $dynamicRef it is a name only
    return False


def _is_any(schema: Any) -> bool:
    return schema is True or (isinstance(schema, Mapping) and not schema)


def _why_not(key: str) -> str:
    if key == "x-guidance":
        return "it is the grammar compiler's own; choose white space with the request's field for it"
    if key == "nullable":
        return 'JSON Schema knows no such key: write "type": [..., "null"]'
    return f"{key} is not supported in a schema that answers must match"


def _check_type(value: Any, path: str) -> Any:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in TYPES:
            raise _refusal(f"{path} is {_shown(value)}; allowed are {', '.join(TYPES)}, or a list of these", path)
    if not names:
        raise _refusal(f"{path} is an empty list; name at least one type", path)
    return value


def _check_required(value: Any, path: str) -> Any:
    if not _is_names(value):
        raise _refusal(f"{path} is {_shown(value)}; it must be a list of property names", path)
    return list(dict.fromkeys(value))


def _check_pattern(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        raise _refusal(f"{path} is {_shown(value)}; it must be a regular expression", path)
    found = plainer(value)
    if fault := fault_of(found):
        raise _refusal(f"{path} is {_shown(value)}: {fault}", path)
    return found


def _check_step(value: Any, path: str) -> Any:
    if not _is_number(value) or value <= 0:
        raise _refusal(f"{path} is {_shown(value)}; it must be a number above 0", path)
    digits = f"{value:.15g}".replace(".", "").lstrip("0").partition("e")[0].rstrip("0")
    if len(digits) > 9 or value > 2**31 or value < NUMBER_STEP:
        raise _refusal(f"{path} is {value}; it may have at most 9 digits and lie between {NUMBER_STEP} and 2**31", path)
    return value


def _check_count(value: Any, path: str) -> Any:
    if not _is_number(value) or value < 0 or value != int(value):
        raise _refusal(f"{path} is {_shown(value)}; it must be a whole number from 0 on", path)
    if value > MAX_REPEAT:
        raise _refusal(f"{path} is {int(value)}; at most {MAX_REPEAT} is allowed", path)
    return int(value)


def _check_number(value: Any, path: str) -> Any:
    if isinstance(value, bool) and ".exclusive" in path:
        return value  # as draft 4 writes it
    if not _is_number(value):
        raise _refusal(f"{path} is {_shown(value)}; it must be a number", path)
    return value


def _check_format(value: Any, path: str) -> Any:
    if value in FORMATS or value in _PLAIN_FORMATS:
        return value
    raise _refusal(f"{path} is {_shown(value)}; allowed are {', '.join(FORMATS)}", path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _types_of(value: Any) -> Sequence[str]:
    if value is None:
        return tuple(name for name in TYPES if name != "integer")
    return value if isinstance(value, list) else (value,)


def _sole_requirement(option: Any) -> str | None:
    if not isinstance(option, Mapping) or {key for key in option if key not in _ANNOTATIONS} != {"required"}:
        return None
    names = option["required"]
    return names[0] if _is_names(names) and len(names) == 1 else None


def _beside(option: Any, schema: Mapping[str, Any]) -> Any:
    """An option together with what stands beside oneOf, as far as it helps to tell options apart."""
    if not isinstance(option, Mapping):
        return option
    kept = {"type": schema["type"]} if "type" in schema else {}
    needed = [names for names in (schema.get("required"), option.get("required")) if isinstance(names, list)]
    return {**kept, **option, "required": [name for names in needed for name in names]}


def _step(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and _PLAIN_KEY.fullmatch(key) else f"[{str(key)[:60]!r}]"


def _dotted(pointer: str) -> str:
    return "".join(_step(part.replace("~1", "/").replace("~0", "~")) for part in pointer.split("/")[1:])


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | type(None)) else _short(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _short(value: Any) -> str:
    """As much of a value as fits a message; large ones are not written out in full first."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key!r}: {_short(item)}" for key, item in [*value.items()][:3])
        return "{" + inner[:80] + (", ..." if len(value) > 3 else "") + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value[:3])[:80] + (", ..." if len(value) > 3 else "") + "]"
    return repr(value)[:80]


def _refusal(message: str, path: str) -> InvalidRequest:
    return InvalidRequest(message, param=path)


def unsupported(message: str, path: str) -> NoReturn:
    """Refuses a schema, for the parts that build on this one."""
    raise _refusal(message, path)
