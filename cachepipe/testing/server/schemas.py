"""Values that fit a JSON schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["instance"]


def instance(schema: object, text: str, root: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a small value that fits a JSON schema, with the text in place of each string.

    It obeys types, properties, items, enumerations, constants, alternatives and local references, and ignores
    bounds and patterns.
    """
    if not isinstance(schema, dict) or depth > 16:
        return text
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][len(text) % len(schema["enum"])]
    followed = _followed(schema, root)
    if followed is not None:
        return instance(followed, text, root, depth + 1)
    return _of_type(schema, text, root, depth)


def _of_type(schema: Mapping[str, Any], text: str, root: Mapping[str, Any], depth: int) -> Any:
    """Return a value of the schema's type, the first one if it has several."""
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: instance(inner, text, root, depth + 1) for name, inner in properties.items()}
    if kind == "array":
        return [instance(schema.get("items") or {}, text, root, depth + 1)]
    plain = {"integer": len(text), "number": len(text) / 2, "boolean": len(text) % 2 == 0, "null": None}
    return plain.get(kind, text)


def _followed(schema: Mapping[str, Any], root: Mapping[str, Any]) -> object:
    """Return the schema of a reference or of the first alternative, or None."""
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step, {}) if isinstance(target, dict) else {}
        return target
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            first: object = schema[name][0]
            return first
    return None
