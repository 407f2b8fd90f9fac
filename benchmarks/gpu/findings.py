"""Lines of JSON that a probe prints, put together."""

import json
from typing import Any


def merged(lines: str) -> dict[str, Any]:
    """One object from many: lists grow, objects are joined, other values replaced.

    A last line that was cut short counts for nothing.
    """
    found: dict[str, Any] = {}
    for line in lines.splitlines(keepends=True):
        if line.endswith("\n"):
            join(found, json.loads(line))
    return found


def join(found: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, list):
            found.setdefault(name, []).extend(value)
        elif isinstance(value, dict):
            found.setdefault(name, {}).update(value)
        else:
            found[name] = value
