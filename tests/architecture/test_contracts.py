"""House rules a parser can check: no global state, documented contracts, complete error classes."""

import ast
from collections.abc import Iterator

import pytest

from streamserve import errors
from tests.architecture.source import Module, modules

MODULES = modules()
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "WeakValueDictionary"}
CHANGING = {
    *("append", "extend", "insert", "remove", "pop", "clear", "add", "discard", "update", "setdefault", "popitem"),
    *("appendleft", "popleft", "extendleft"),
}


def _module_values(module: Module) -> Iterator[tuple[str, ast.expr]]:
    for node in module.tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _is_empty(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, ast.List | ast.Set):
        return not value.elts
    return isinstance(value, ast.Call) and not value.args and not value.keywords


def _changed_names(module: Module) -> set[str]:
    """Names that some statement of the file changes in place."""
    changed = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            changed.add(getattr(node.func.value, "id", ""))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.add(getattr(node.value, "id", ""))
        elif isinstance(node, ast.AugAssign):
            changed.add(getattr(node.target, "id", ""))
    return changed


def test_no_global_statement() -> None:
    found = [f"{m.path.name}:{node.lineno}" for m in MODULES for node in ast.walk(m.tree) if isinstance(node, ast.Global)]
    assert found == []


def test_no_state_at_module_level() -> None:
    """A table is fine; a container that starts empty or that the file changes is state without an owner."""
    wrong = []
    for module in MODULES:
        changed = _changed_names(module)
        wrong += [
            f"{module.name}.{name}"
            for name, value in _module_values(module)
            if name != "__all__" and _is_mutable(value) and (_is_empty(value) or name in changed)
        ]
    assert wrong == []


def _classes(module: Module) -> Iterator[ast.ClassDef]:
    yield from (node for node in module.tree.body if isinstance(node, ast.ClassDef))


def test_every_file_says_what_it_owns() -> None:
    assert [m.name for m in MODULES if m.tree.body and ast.get_docstring(m.tree) is None] == []


def test_every_public_class_and_protocol_states_its_contract() -> None:
    wrong = [
        f"{module.name}.{node.name}"
        for module in MODULES
        for node in _classes(module)
        if not node.name.startswith("_") and ast.get_docstring(node) is None
    ]
    assert wrong == []


def _base_names(node: ast.ClassDef) -> list[str]:
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in bases]


def test_a_class_has_one_base_at_most_beside_protocols() -> None:
    wrong = [
        f"{module.name}.{node.name}"
        for module in MODULES
        for node in _classes(module)
        if len([name for name in _base_names(node) if name not in ("Protocol", "Generic")]) > 1
    ]
    assert wrong == []


def _error_classes() -> list[type[errors.StreamServeError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.StreamServeError)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("error", _error_classes(), ids=lambda error: error.__name__)
def test_every_error_class_fixes_status_type_and_code(error: type[errors.StreamServeError]) -> None:
    assert 400 <= error.status <= 599
    assert error.type and error.code
    assert issubclass(error, errors.RequestError) == (error.status < 500)
    assert error.__doc__


def test_every_error_of_the_package_is_in_the_tree() -> None:
    """Classes elsewhere that derive from a built-in exception directly have no HTTP status and never reach a client."""
    outside = {
        f"{module.name}.{node.name}"
        for module in MODULES
        if module.name != "errors"
        for node in _classes(module)
        if any(name in ("Exception", "ValueError", "RuntimeError", "BaseException") for name in _base_names(node))
    }
    assert outside <= {"flags.UsageError", "api.wire.ClientLeft", "lang.tracing._Enough"}


def test_nothing_is_caught_bare() -> None:
    found = [
        f"{m.path.name}:{node.lineno}"
        for m in MODULES
        for node in ast.walk(m.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert found == []
