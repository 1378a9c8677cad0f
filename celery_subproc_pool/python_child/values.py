"""Which values JSON holds exactly, and text for the others."""

from __future__ import annotations

import math
from typing import Any

__all__ = ("is_plain", "utf8_text")

_SCALARS = frozenset((str, int, bool, type(None)))


def is_plain(value: Any) -> bool:
    """Return whether `value` survives JSON unchanged. Tuples count, though they become lists."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is dict:
        # This runs for each task. A loop costs half of what `all` does.
        for key, inner in value.items():
            if type(key) is not str or (type(inner) not in _SCALARS and not is_plain(inner)):
                return False
        return True
    if kind is list or kind is tuple:
        return all(map(is_plain, value))
    return kind is float and math.isfinite(value)


def utf8_text(value: Any) -> str:
    """Return ``str(value)`` with lone surrogates escaped, which UTF-8 can't hold."""
    return str(value).encode("utf-8", "backslashreplace").decode()
