"""Celery's stacks of current tasks and requests, kept in context variables.

Celery keeps them by thread and greenlet. All coroutines run in one greenlet, and what they start
may run in other threads. A context variable has one value for each job, which is passed on to
whatever the job starts: `asyncio.create_task`, `asyncio.to_thread` and `sync_to_async` copy the
context.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from celery import Celery, _state
from celery.utils.threads import LocalStack

__all__ = ("keep_stacks_in_context",)


class ContextStack(LocalStack):
    """A stack whose content belongs to the current context. A copied context has a copy."""

    _variable: ContextVar[tuple[Any, ...]]

    def push(self, obj: Any) -> list[Any]:
        """Add `obj`, and return the stack."""
        stack = (*self._variable.get(), obj)
        self._variable.set(stack)
        return list(stack)

    def pop(self) -> Any:
        """Remove and return the topmost object; None if there is none."""
        stack = self._variable.get()
        if not stack:
            return None
        self._variable.set(stack[:-1])
        return stack[-1]

    def __len__(self) -> int:
        return len(self._variable.get())

    def __release_local__(self) -> None:
        self._variable.set(())

    @property
    def stack(self) -> list[Any]:
        """The objects, the topmost last."""
        return list(self._variable.get())

    @property
    def top(self) -> Any:
        """The topmost object; None if there is none."""
        stack = self._variable.get()
        return stack[-1] if stack else None


def keep_stacks_in_context(app: Celery) -> None:
    """Change the stack of current tasks, and the stack of requests of each task of `app`.

    To be called before Celery's tracers are built: they keep the methods of the stacks.
    """
    _keep_in_context("tasks", _state._task_stack)
    for name, task in app.tasks.items():
        _keep_in_context(name, task.request_stack)


def _keep_in_context(name: str, stack: Any) -> None:
    # The object stays the same one: many modules have it. Celery 5.3 to 5.7 have no public way.
    if type(stack) is ContextStack:
        return
    stack._variable = ContextVar(f"celery stack of {name}", default=())
    stack.__class__ = ContextStack
