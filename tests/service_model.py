"""Requests held against the models of AWS's services that botocore brings along."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from botocore.model import Shape
from botocore.session import Session
from botocore.validate import ParamValidator


def wrong(operation: str, request: dict[str, Any], service: str = "sagemaker") -> list[str]:
    """What the service would refuse: types, names and ranges, and what botocore does not look at, patterns and enums."""
    shape = _input(service, operation)
    report = ParamValidator().validate(request, shape).generate_report()
    return [report] if report else list(_unmatched(shape, request))


@cache
def _input(service: str, operation: str) -> Shape:
    shape = Session().get_service_model(service).operation_model(operation).input_shape
    assert shape is not None
    return shape


def _unmatched(shape: Shape, value: Any) -> Iterator[str]:
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from _unmatched(shape.members[name], part)  # type: ignore[attr-defined]
    elif shape.type_name == "list":
        for part in value:
            yield from _unmatched(shape.member, part)  # type: ignore[attr-defined]
    elif shape.type_name == "map":
        for name, part in value.items():
            yield from _unmatched(shape.key, name)  # type: ignore[attr-defined]
            yield from _unmatched(shape.value, part)  # type: ignore[attr-defined]
    elif shape.type_name == "string":
        pattern, enum = shape.metadata.get("pattern"), shape.metadata.get("enum")
        if pattern and not re.fullmatch(_in_python(pattern), value):
            yield f"{shape.name}: {value}"
        if enum and value not in enum:
            yield f"{shape.name}: {value}"
        if not shape.metadata.get("min", 0) <= len(value) <= shape.metadata.get("max", 1 << 20):
            yield f"{shape.name}: {len(value)} characters"


def _in_python(pattern: str) -> str:
    """Without the classes of Unicode that `re` does not know."""
    return pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{Z}", " ").replace(r"\p{N}", "0-9")
