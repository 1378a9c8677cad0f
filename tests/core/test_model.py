"""Each field has one module that writes it: the table at the top of `model` is true."""

from __future__ import annotations

import ast
import re
import weakref
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from celery_subproc_pool.core import model
from celery_subproc_pool.core.counters import Counters
from celery_subproc_pool.core.model import Child, Group, Job, Slot

CORE = Path(model.__file__).parent
CLASSES = {cls.__name__: cls for cls in (Job, Child, Slot, Group)}
MODULES = sorted(path.stem for path in CORE.glob("[a-z]*.py"))

#: Methods of containers that change them.
CHANGES = {"append", "clear", "extend", "insert", "move_to_end", "pop", "popleft", "remove"}

#: Written by `engine`, or never.
OTHERS = {
    "open_line",
    "bad_greeting",
    "settings",
    "decode",
    "withheld",
    "ends_at_soft_limit",
    "forks",
    "slot",
}


def owners() -> dict[str, set[str]]:
    """Return the modules that may write a field, by the field's name, as `model` tells."""
    assert model.__doc__
    found: dict[str, set[str]] = {}
    for module, text in re.findall(r"^(\w+)\n((?:    .*\n)+)", model.__doc__, re.MULTILINE):
        for word in re.findall(r"`(?:\w+\.)?(\w+)`", text):
            names = [word]
            if word == "Job":
                names = [each.name for each in fields(Job)]
            for name in names:
                found.setdefault(name, set()).add(module)
    for name in ("deadline", "soft_deadline", "silence_deadline", "kill_at"):
        found[name].discard("jobs")
    return found


def written_by(module: str) -> Iterator[tuple[str, int]]:
    """Yield the attributes of other objects that `module` writes, with the line."""
    for node in ast.walk(ast.parse((CORE / f"{module}.py").read_text())):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in CHANGES
        ):
            targets = [node.func.value]
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                changed = each.value if isinstance(each, ast.Subscript) else each
                if isinstance(changed, ast.Attribute) and not (
                    isinstance(changed.value, ast.Name) and changed.value.id == "self"
                ):
                    yield changed.attr, node.lineno


FIELDS = {each.name for cls in CLASSES.values() for each in fields(cls)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_writes_only_the_fields_that_it_owns(module: str) -> None:
    for name, line in written_by(module):
        assert name not in FIELDS or module in owners()[name], f"{module}.py:{line} writes {name}"


def test_each_field_has_an_owner() -> None:
    assert FIELDS - set(owners()) == OTHERS


@pytest.mark.parametrize(
    ("states", "modules"), [("JobState", {"jobs"}), ("ChildState", {"exits", "service"})]
)
def test_only_owners_move_jobs_and_children(states: str, modules: set[str]) -> None:
    pattern = re.compile(rf"\.move\((?:{states}\b|state\b)")
    movers = {each for each in MODULES if pattern.search((CORE / f"{each}.py").read_text())}
    assert movers - ({"service"} if states == "JobState" else set()) == modules


@pytest.mark.parametrize("cls", [*CLASSES.values(), Counters])
def test_state_has_slots_and_is_hashed_by_identity(cls: type) -> None:
    assert "__slots__" in vars(cls)
    assert "__dict__" not in vars(cls)
    assert cls.__hash__ is object.__hash__
    assert cls.__eq__ is object.__eq__


def test_a_job_can_be_referenced_weakly() -> None:
    job = Job("x", "task.x", "a")
    assert weakref.ref(job)() is job
