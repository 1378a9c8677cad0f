"""Makes coroutine functions of the tasks of Celery's own integration tests.

The tests stay as they are, and so does their side of the tasks. Only the worker has the others: a
project may move to `async def` task by task, and what sends the tasks must not notice.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

TASKS = Path("t", "integration", "tasks.py")


def copy_with_coroutines(source: Path, directory: Path) -> None:
    """Copy Celery's unpacked source distribution to `directory`, where its tests' tasks are
    coroutine functions."""
    shutil.copytree(source, directory)
    path = directory / TASKS
    path.write_text(rewritten(path.read_text()))


def rewritten(text: str) -> str:
    """Return the module `text` with coroutine functions for tasks."""
    module = ast.parse(text)
    tasks = {node.name for node in ast.walk(module) if _is_task(node)}
    assert "add" in tasks, "Celery's tests define their tasks in another way"
    module = _Rewriter(tasks).visit(module)
    module.body.insert(0, ast.Import([ast.alias("asyncio")]))
    return ast.unparse(ast.fix_missing_locations(module))


def _is_task(node: ast.AST) -> bool:
    """Return whether `node` is the body of a task: a function with the decorator, or a method
    `run`."""
    if not isinstance(node, ast.FunctionDef):
        return False
    names = (
        decorator.func if isinstance(decorator, ast.Call) else decorator
        for decorator in node.decorator_list
    )
    return node.name == "run" or any(
        isinstance(name, ast.Name) and name.id == "shared_task" for name in names
    )


class _Rewriter(ast.NodeTransformer):
    """Does what a person would do who moves a task to `async def`.

    Arguments:
        tasks: the names of the tasks.
    """

    def __init__(self, tasks: set[str]) -> None:
        self._tasks = tasks

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Turn a task into a coroutine function, and leave other functions as they are."""
        if not _is_task(node):
            return node
        self.generic_visit(node)
        # The loop turns before the body does its work: other jobs may begin, or end.
        start = 1 if ast.get_docstring(node) is not None else 0
        node.body[start:start] = ast.parse("async def f(): await asyncio.sleep(0)").body[0].body
        fields = {name: getattr(node, name) for name in node._fields if hasattr(node, name)}
        return ast.AsyncFunctionDef(**fields)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Await what has to be awaited now: `time.sleep`, and another task's body."""
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name):
            return node
        if node.func.id == "sleep":
            node.func = ast.parse("asyncio.sleep", mode="eval").body
            return ast.Await(node)
        return ast.Await(node) if node.func.id in self._tasks else node
