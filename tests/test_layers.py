"""An import points only to the left: the table of CONTRIBUTING.md, kept."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import celery_subproc_pool

PACKAGE = Path(celery_subproc_pool.__file__).parent

#: What each module may import of ours, and of other packages beside the standard library.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "guardian": (set(), set()),
    "forks": (set(), set()),
    "serve": (set(), set()),
    "intake": (set(), {"celery", "kombu"}),
    "tracing": (set(), set()),
    "wakeup": (set(), set()),
    "printing": (set(), set()),
    "lines": ({"printing"}, set()),
    "protocol": ({"errors", "printing"}, {"msgspec"}),
    "config": ({"errors"}, {"msgspec"}),
    "banner": ({"config"}, set()),
    "records": ({"config", "protocol"}, {"msgspec"}),
    "facts": ({"records"}, set()),
    "greetings": ({"config", "printing", "protocol", "records"}, set()),
    "limits": ({"records"}, set()),
    "queues": ({"records"}, set()),
    "crashes": ({"records"}, set()),
    "children": ({"errors", "limits", "protocol", "records"}, set()),
    "scheduler": (
        {"children", "crashes", "limits", "protocol", "queues", "records"},
        set(),
    ),
    "memory": (set(), {"psutil"}),
    "programs": (set(), {"psutil"}),
    "child": ({"errors"}, set()),
    "remains": ({"child", "programs"}, set()),
    "live": ({"child", "errors", "lines", "printing", "protocol", "records"}, {"msgspec"}),
    "reports": ({"live", "records"}, {"psutil"}),
    "supervisor": (
        {
            "child",
            "errors",
            "forks",
            "guardian",
            "live",
            "memory",
            "printing",
            "programs",
            "protocol",
            "records",
            "remains",
            "reports",
            "scheduler",
            "wakeup",
        },
        set(),
    ),
    "outcome": ({"errors", "live", "protocol", "records"}, {"billiard", "celery"}),
    "compat": ({"outcome"}, {"billiard", "celery", "kombu"}),
    "settings_sent": ({"protocol"}, {"celery"}),
    "replay": ({"compat", "config", "protocol"}, {"celery", "click", "kombu"}),
    "tasks": ({"compat", "errors", "outcome", "protocol"}, {"celery"}),
    "routes": ({"config", "errors", "tasks"}, {"celery"}),
    "untraced": ({"compat", "protocol", "tasks"}, {"celery", "kombu"}),
    "jobs": ({"errors", "outcome", "protocol", "records", "tasks", "untraced"}, {"billiard"}),
    "messages": ({"errors", "protocol"}, {"billiard", "celery", "kombu", "msgspec"}),
    "calls": ({"config", "errors", "jobs", "messages"}, {"billiard", "celery", "kombu"}),
    "withheld": ({"config"}, {"celery"}),
    "ends": (
        {
            "compat",
            "errors",
            "intake",
            "jobs",
            "live",
            "messages",
            "outcome",
            "protocol",
            "records",
        },
        {"billiard", "celery"},
    ),
    "launch": (
        {
            "compat",
            "config",
            "errors",
            "messages",
            "protocol",
            "records",
            "replay",
            "routes",
            "settings_sent",
            "withheld",
        },
        {"celery", "click"},
    ),
    "loading": (
        {"compat", "config", "forks", "messages", "protocol", "replay", "settings_sent"},
        {"billiard", "celery"},
    ),
    "soft_limits": ({"compat"}, {"celery"}),
    "worker_child": (
        {"loading", "messages", "protocol", "serve", "soft_limits"},
        {"billiard", "celery"},
    ),
    "events": ({"records"}, {"celery"}),
    "control": ({"errors"}, {"celery"}),
    "drivers": ({"compat", "errors", "supervisor"}, {"celery"}),
    "pool": (
        {
            "banner",
            "calls",
            "compat",
            "config",
            "control",
            "drivers",
            "ends",
            "errors",
            "events",
            "facts",
            "greetings",
            "intake",
            "jobs",
            "launch",
            "live",
            "messages",
            "outcome",
            "protocol",
            "records",
            "reports",
            "routes",
            "scheduler",
            "supervisor",
            "tracing",
            "untraced",
        },
        {"billiard", "celery", "click"},
    ),
    "tables": (set(), {"rich"}),
    "cli": (
        {"banner", "compat", "config", "control", "errors", "launch", "routes", "tables"},
        {"celery", "click"},
    ),
}

#: Modules that decide: no clock, no process, no thread may come near them.
PURE = (
    "errors",
    "printing",
    "lines",
    "protocol",
    "config",
    "records",
    "facts",
    "greetings",
    "limits",
    "queues",
    "crashes",
    "children",
    "scheduler",
)
IMPURE = {"asyncio", "multiprocessing", "select", "selectors", "subprocess", "threading", "time"}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Return what `module` imports: the names of modules of ours, and of top-level packages."""
    ours: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            ours |= {node.module} if node.module else {alias.name for alias in node.names}
    # The package's own, which imports nothing.
    return ours - {"__version__"}, others - {"__future__"}


def test_every_module_has_its_layer() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_to_the_left(module: str) -> None:
    may_ours, may_others = LAYERS[module]
    ours, others = imports(module)
    assert ours <= may_ours
    assert others - set(sys.stdlib_module_names) <= may_others


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_clock_process_or_thread(module: str) -> None:
    _, others = imports(module)
    assert not others & IMPURE


def test_the_table_has_no_circle() -> None:
    order = list(LAYERS)
    for module, (ours, _) in LAYERS.items():
        assert all(order.index(lower) < order.index(module) for lower in ours), module


def test_the_package_imports_nothing_heavy_until_asked() -> None:
    code = "import sys, celery_subproc_pool; print(*{'celery', 'msgspec'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""
