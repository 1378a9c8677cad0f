"""Imports follow the folders. Each `__init__` says what its folder may import; this checks it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import celery_subproc_pool

PACKAGE = Path(celery_subproc_pool.__file__).parent

#: What each folder, and each module beside them, may import of ours. A row may name only rows above
#: it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "serve": set(),
    "tables": set(),
    "settings": set(),
    "signals": set(),
    "config": {"errors", "settings"},
    "wire": {"errors"},
    "core": {"errors", "settings", "wire"},
    "engine": {"core", "errors", "wire"},
    "python_child": {"errors", "serve", "settings", "wire"},
    "asyncio_child": {"errors", "python_child", "serve", "wire"},
    "tracer": {"errors", "python_child", "serve", "signals", "wire"},
    "worker": {"config", "core", "engine", "errors", "python_child", "settings", "tracer", "wire"},
    "cli": {"config", "errors", "settings", "tables", "worker"},
}

#: What each may import of other packages. All may import the standard library.
MAY_USE: dict[str, set[str]] = {
    "tables": {"rich"},
    "settings": {"msgspec"},
    "signals": {"celery"},
    "config": {"msgspec"},
    "wire": {"msgspec"},
    "core": {"msgspec"},
    "engine": {"psutil"},
    "python_child": {"billiard", "celery", "click", "greenlet", "kombu", "msgspec"},
    "asyncio_child": {"asgiref", "billiard", "celery", "django", "greenlet", "uvloop"},
    "tracer": {"billiard", "celery", "greenlet"},
    "worker": {"billiard", "celery", "click", "kombu", "msgspec"},
    "cli": {"celery", "click"},
}

#: The pure folders and modules: they may use no clock, process or thread.
PURE = ("errors", "settings", "config", "wire", "core")
IMPURE = {"asyncio", "multiprocessing", "select", "selectors", "subprocess", "threading", "time"}

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def room(module: str) -> str:
    """Return the folder of `module`, or its own name if it has none."""
    return module.partition(".")[0]


def imports(module: str) -> tuple[set[str], set[str]]:
    """Return what `module` imports: modules of ours, by their path, and top-level packages."""
    ours: set[str] = set()
    others: set[str] = set()
    home = module.split(".")
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*home[: len(home) - node.level], *(node.module or "").split(".")]
            path = ".".join(filter(None, base))
            ours |= {path} if path in MODULES else {f"{path}.{a.name}" for a in node.names}
    # Names of the package itself, such as `PACKAGE`, begin with a dot. They import nothing.
    return {name.lstrip(".") for name in ours} & set(MODULES), others - {"__future__"}


def test_every_folder_and_module_has_its_row() -> None:
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)
    rows = list(MAY_IMPORT)
    for name, lower in MAY_IMPORT.items():
        assert all(rows.index(each) < rows.index(name) for each in lower), name


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_folder_may(module: str) -> None:
    ours, others = imports(module)
    assert {room(each) for each in ours} - {room(module)} <= MAY_IMPORT[room(module)]
    assert others - set(sys.stdlib_module_names) <= MAY_USE.get(room(module), set())


def test_no_folder_has_a_cycle() -> None:
    # Raises `CycleError`, which names the modules of the cycle.
    TopologicalSorter({module: imports(module)[0] for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in PURE])
def test_pure_modules_know_no_clock_process_or_thread(module: str) -> None:
    _, others = imports(module)
    assert not others & IMPURE


def loaded_by(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after `code`."""
    code = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_the_package_imports_nothing_heavy_until_asked() -> None:
    assert not {"celery", "msgspec"} & loaded_by("import celery_subproc_pool")


def test_declaring_a_task_imports_neither_the_engine_nor_celerys_worker() -> None:
    loaded = loaded_by("from celery_subproc_pool import SubprocTask")
    assert "celery_subproc_pool.tracer.tasks" in loaded
    assert "celery.worker.request" not in loaded
    heavy = ("celery_subproc_pool.engine", "celery_subproc_pool.core.scheduler")
    assert not {name for name in loaded if name.startswith(heavy)}


def defined(tree: ast.Module) -> set[str]:
    """Return the functions and classes of a module, and the methods as ``Class.method`` too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef)
            }
    return names


def test_contributing_names_files_and_functions_that_exist() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:\w+/)?\w+\.py)(?:: ([\w.]+))?`", text)
    assert len(named) > 20
    for file, name in named:
        path = next(iter([*PACKAGE.glob(file), *PACKAGE.glob(f"*/{file}")]), None)
        assert path is not None or (PACKAGE.parent / file).exists(), file
        if name:
            assert path is not None
            assert name in defined(ast.parse(path.read_text())), f"{file}: {name}"
