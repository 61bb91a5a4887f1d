"""Reading a configuration from plain YAML and `dotted.key=value`, with one-line error messages."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel

from ..utils.messages import reason, shown, shown_name

MAX_DEPTH = 20  # levels of nesting; a run's configuration has three


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but it refuses aliases (which may expand exponentially), repeated keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        problem = f"nested more than {MAX_DEPTH} levels deep" if self.depth >= MAX_DEPTH else None
        if self.check_event(yaml.AliasEvent):
            problem = f"aliases (*{shown_name(event.anchor)}) are not read: write the value out"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        value.encode()  # raises for half a surrogate pair, which no file name has and no file can hold
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "the same key is given twice", node.start_mark)
        return values


def parse_yaml(text: str | bytes, name: str) -> Any:
    """Parses `text` into plain types only, never objects. `name` is where the text comes from, for error messages."""
    try:
        return yaml.load(text, _PlainLoader)
    # PyYAML lets through whatever its conversion of a malformed number, date or flag raises.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read {name} as YAML: {reason(error)}") from error


def override_value(cls: type[BaseModel], key: str, text: str) -> Any:
    """Reads the value of a `dotted.key=value`: YAML, but for keys that hold a text, which is taken as it is written.

    Such a text may still be quoted as in YAML, and `null` or nothing unsets it. In a template a backslash and an n are
    a line break, which a shell's command line can hardly hold.
    """
    fields, annotation = cls.model_fields, None
    for part in key.split("."):
        annotation = fields[part].annotation if part in fields else None
        fields = getattr(annotation, "model_fields", {})
    is_text = annotation in (str, str | None)
    if not is_text or text.strip() in ("", "null", "~") or text.lstrip().startswith(("'", '"')):
        return parse_yaml(text, f"the value of {shown_name(key)!r}")
    text.encode()  # half a surrogate pair is refused, as in a file
    return text.replace("\\n", "\n") if key in ("data.template", "data.target_template") else text.strip()


def message_of(cls: type[BaseModel], values: dict[str, Any], error: Any) -> str:
    """Describes one of pydantic's errors in a line: the key, what it expects and what it got."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":  # raised by one of our own checks, which name their keys
        return str(context["error"])
    below = {name: getattr(field.annotation, "model_fields", {}) for name, field in cls.model_fields.items()}
    key, *inside = error["loc"]
    keys, prefix = cls.model_fields, ""
    if inside and below.get(key):
        keys, prefix, values, key = below[key], f"{key}.", values[key], inside[0]
    if kind in ("extra_forbidden", "invalid_key"):
        text = shown_name(str(key))
        elsewhere = {name: f"{section}.{name}" for section, names in below.items() for name in names}
        near = [prefix + name for name in difflib.get_close_matches(text, keys, n=1, cutoff=0.5)] or [
            elsewhere[name] for name in difflib.get_close_matches(text, elsewhere, n=1, cutoff=0.8)
        ]
        known = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(keys)}"
        return f"unknown key {prefix}{text}: {known}"
    if kind in _LIMITS:
        return f"{prefix}{key} {_LIMITS[kind].format(**context)}, got {shown(error['input'])}"
    value = values[key]
    message = f"{prefix}{key}: expected {expected(keys[key].annotation)}, got {describe(value)}"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) for item in items):
        message += " (YAML reads yes, no, on, off as true and false: put such words in quotes)"
    return message


_LIMITS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must not be negative",
    "less_than_equal": "must be at most {le}",
}
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Any: "a value"}


def expected(hint: Any) -> str:
    """Describes a type to the author of a file, as in `a list of texts or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return expected(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(expected, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, dict):
        one, of, parts = expected(arguments[-1]).partition(" of ")
        return f"{'a list of' if origin is list else 'a mapping to'} {one.removeprefix('a ')}s{of}{parts}"
    return "null" if hint is types.NoneType else _WORDS.get(hint, "a section with keys")


def describe(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"
