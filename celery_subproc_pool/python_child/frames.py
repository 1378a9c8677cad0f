"""Tells this package's own frames from those of the project and of other packages."""

from __future__ import annotations

from types import FrameType

from .. import PACKAGE

__all__ = ("is_ours",)


def is_ours(frame: FrameType) -> bool:
    """Return whether `frame` runs code of this package, in whatever folder."""
    return str(frame.f_globals.get("__package__")).partition(".")[0] == PACKAGE
