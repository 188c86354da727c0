"""IAM policies, for tests: in a template or in an account."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements(value: Any, of: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(resource, statement) of every policy, whatever condition it hangs on."""
    if isinstance(value, dict):
        if "Effect" in value:
            yield of, value
        for name, part in value.items():
            yield from statements(part, of or name)
    elif isinstance(value, list):
        for part in value:
            yield from statements(part, of)
