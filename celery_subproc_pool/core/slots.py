"""Which child serves a slot, and which one is its successor."""

from __future__ import annotations

from .model import Child, Exit, Group, Slot

__all__ = ("add", "forget", "leave", "note_exit", "place", "promote", "remove")


def place(child: Child) -> None:
    """Put a new child into its slot: as its child, or as the successor if it has a child."""
    slot, group = child.slot, child.group
    group.children[child.number] = child
    if slot.child is None:
        slot.child = child
    else:
        slot.successor = child
        group.successors += 1


def promote(slot: Slot) -> None:
    """Let the successor take the slot; without one, the slot is empty."""
    slot.child, slot.successor = slot.successor, None
    if slot.child is not None:
        slot.child.group.successors -= 1


def leave(child: Child) -> bool:
    """Take `child` from its slot, and promote its successor. Return whether it was there."""
    slot = child.slot
    if slot.child is child:
        promote(slot)
        return True
    if slot.successor is child:
        slot.successor = None
        child.group.successors -= 1
        return True
    return False


def note_exit(child: Child, reason: str, now: float) -> None:
    """Remember `child` as the latest one that its slot lost."""
    child.slot.last_exit = Exit(child.pid, reason, now)


def forget(child: Child) -> None:
    """Forget `child`, which is gone, but not how many jobs it has begun."""
    del child.group.children[child.number]
    child.slot.jobs_begun += child.jobs_begun
    child.group.counters.count_gone(child.jobs_begun)


def add(group: Group) -> Slot:
    """Add an empty slot, with the next number."""
    slot = Slot(max((slot.number for slot in group.slots), default=-1) + 1)
    group.slots.append(slot)
    return slot


def remove(group: Group, slot: Slot) -> list[Child]:
    """Remove `slot`; return its children, which serve no slot now."""
    group.slots.remove(slot)
    group.successors -= slot.successor is not None
    children = [child for child in (slot.child, slot.successor) if child is not None]
    slot.child = slot.successor = None
    return children
