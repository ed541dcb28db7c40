"""The schema of bundle.json, from the dataclasses that read it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from typing import Any, get_args

from tango_runtime.bundle import manifest
from tools.docs.markdown import code, prose, table

#: Names of types that stand for numbers within bounds, as the page explains them.
_NUMBERS = {"Whole": "integer", "Positive": "positive integer", "Signed": "signed integer", "Bytes": "long integer"}
_PLAIN = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "None": "null"}

_ATTRIBUTE = re.compile(r"^    (\w+): ", re.MULTILINE)


def schema() -> str:
    """A section for each object: its keys, their types, and what they mean."""
    return "\n".join(map(_section, _objects(manifest.Manifest)))


def format_version() -> str:
    """The version of the schema."""
    return f"The current format is {manifest.FORMAT}."


def _objects(kind: type[Any], found: list[type[Any]] | None = None) -> list[type[Any]]:
    """A dataclass and those in its fields, in the order of their first use."""
    found = [] if found is None else found
    if kind in found:
        return found
    found.append(kind)
    for field in dataclasses.fields(kind):
        for name in re.findall(r"\w+", str(field.type)):
            other = getattr(manifest, name, None)
            if dataclasses.is_dataclass(other) and isinstance(other, type) and name != "Range":
                _objects(other, found)
    return found


def _section(kind: type[Any]) -> str:
    text, meaning = _docstring(kind)[0], meanings(kind)
    rows = [(code(f.name), _type(f), _required(f), meaning[f.name]) for f in dataclasses.fields(kind)]
    title = "bundle.json" if kind is manifest.Manifest else kind.__name__
    return f"### {title}\n\n{prose(text)}\n\n" + table(("key", "type", "required", "meaning"), rows)


def meanings(kind: type[Any]) -> dict[str, str]:
    """What a dataclass says of each of its fields."""
    parts = _ATTRIBUTE.split(re.sub(r"\bNone\b", "absent", _docstring(kind)[1]))[1:]
    return {name: prose(text).replace("\n\n", " ") for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _docstring(kind: type[Any]) -> tuple[str, str]:
    """The text of a docstring, and its section about attributes."""
    text, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    return text, attributes


def _required(field: dataclasses.Field[Any]) -> str:
    return "yes" if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING else "no"


def _type(field: dataclasses.Field[Any]) -> str:
    return _words(ast.parse(str(field.type), mode="eval").body)


def _words(node: ast.expr) -> str:
    """An annotation in words."""
    if isinstance(node, ast.BinOp):  # a union; null is what "optional" says
        sides = [_words(side) for side in (node.left, node.right)]
        return " or ".join(side for side in sides if side != "null")
    if isinstance(node, ast.Constant):
        return "null" if node.value is None else code(str(node.value))
    if isinstance(node, ast.Name):
        return _name(node.id)
    assert isinstance(node, ast.Subscript), ast.dump(node)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    outer = ast.unparse(node.value)
    if outer == "Literal":
        choices = [ast.literal_eval(each) for each in inner]
        return ", ".join(code(choice) if isinstance(choice, str) else str(choice) for choice in choices)
    if outer == "Annotated":
        low, high = (ast.literal_eval(_power(each)) for each in inner[1].args)  # type: ignore[attr-defined]
        return f"{_words(inner[0])} from {low:,} to {high:,}"
    if outer == "dict":
        return f"object of {_words(inner[1])}"
    if outer == "list" or (len(inner) == 2 and ast.unparse(inner[1]) == "..."):
        return f"list of {_words(inner[0])}"
    assert outer == "tuple", outer
    return f"[{', '.join(map(_words, inner))}]"


def _power(node: ast.expr) -> ast.expr:
    """A bound that is written as a power, as a number."""
    return ast.Constant(eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": {}}))


def _name(name: str) -> str:
    if name in _NUMBERS or name in _PLAIN:
        return {**_NUMBERS, **_PLAIN}[name]
    found = getattr(manifest, name)
    if dataclasses.is_dataclass(found):
        return f"[{name}](#{name.lower()})"
    if name == "Config":
        return "object of objects"
    return ", ".join(code(choice) for choice in get_args(found))
