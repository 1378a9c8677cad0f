"""What is odd about what a child said when it was ready, in words for the log.

Layer: above `records` and `config`. Must not import Celery.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..core.model import Child
from ..settings import ROOT
from ..wire.messages import Feature
from ..wire.text import printable

__all__ = ("complaints",)


def complaints(child: Child, takes_tasks: bool) -> Iterator[str]:
    """Yield what a person should know of the greeting of `child`, each to follow "its group".

    Arguments:
        child: a child that is ready.
        takes_tasks: whether there is a task that its group takes.
    """
    group = child.group
    path = f"{ROOT}.children.{group.name}"
    if child.unknown_features:
        known = ", ".join(feature.value for feature in Feature)
        words = ", ".join(printable(word) for word in child.unknown_features)
        yield f"announce features that this pool does not know: {words}; it knows {known}"
    most = group.settings.max_in_flight
    if child.capacity < most:
        features = ", ".join(sorted(each.value for each in child.features)) or "none"
        yield (
            f"take one job at a time, though {path}.max_in_flight is {most}: they do not announce"
            f" 'multiplex' (their features: {features})"
            if Feature.MULTIPLEX not in child.features
            else f"take {child.capacity} jobs at a time by their own word, though"
            f" {path}.max_in_flight is {most}, by which the number of children is reckoned: set it"
            f" to {child.capacity}, or set a size"
        )
    if not takes_tasks:
        yield (
            f"have no tasks: {path}.tasks is empty, they announce none, and no task names the"
            f" group as its child"
        )
