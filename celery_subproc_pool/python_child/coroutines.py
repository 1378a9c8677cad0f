"""Tasks whose body is a coroutine function, and hooks that are.

Celery calls a task's body and its hooks, and takes what they return for their result. For an
``async def``, that is a coroutine that nobody has awaited. `let_await` puts a synchronous function
in the place of each, which awaits it. How, is up to the process: in an asyncio child, the greenlet
of the trace waits, and other jobs go on. Anywhere else an event loop runs until the coroutine is
done.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import CellType, FrameType
from typing import Any

from celery import Celery, Task, _state
from celery.backends.base import Backend

from ..settings import CELERY_PREFIX
from .stacks import keep_stacks_in_context

__all__ = (
    "Await",
    "await_tasks",
    "is_async",
    "let_await",
    "run_coroutines",
    "run_to_end",
)

#: Awaits a coroutine for a synchronous caller. The flag is whether it is the body of a task, or the
#: hook before it: code that a soft time limit may interrupt.
Await = Callable[[Coroutine[Any, Any, Any], bool], Any]

#: The hooks of a task that Celery calls (5.3 to 5.7: celery/app/task.py).
HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")

#: Set in a task: whether its body is a coroutine function, once `let_await` has replaced that.
_IS_ASYNC = "_subproc_pool_is_async"

#: Set in a request, once the body of its task was called by Celery.
_BEGUN = "_subproc_pool_begun"


#: Celery's function that calls errbacks (5.3 to 5.7: celery/backends/base.py).
_CALLS_ERRBACKS = Backend._call_task_errbacks.__code__

#: How many frames away it is at most: those of Celery's and wrappers' calls. What the coroutine of
#: an errback calls is farther away: an event loop is between.
_NEAR = 10


def is_async(task: Task) -> bool:
    """Return whether the body of `task` is a coroutine function, or a wrapper of one.

    A wrapper is what `functools.wraps` or wrapt makes: Celery for ``autoretry_for`` and
    ``pydantic``, agents, a project's own.
    """
    if _IS_ASYNC in vars(task):
        return bool(vars(task)[_IS_ASYNC])
    called = type(task).__call__
    return _is_coroutine_function(called) or any(
        _is_coroutine_function(function) for function in _unwrapped(_body(task))
    )


def await_tasks(app: Celery, wait: Await) -> None:
    """Let the bodies and hooks of all tasks of `app` be awaited, as `let_await` does."""
    for task in app.tasks.values():
        let_await(task, wait)


def run_coroutines(app: Celery) -> None:
    """Let the ``async def`` tasks of `app` run in this process where `apply()` calls them, or
    `delay()` with the setting `task_always_eager`: in tests, or in a shell.

    Each call runs an event loop of its own until the task's coroutine is done. Workers with this
    pool need no such call.

    Arguments:
        app: the app. Tasks that are registered later do not count.
    """
    keep_stacks_in_context(app)
    await_tasks(app, run_to_end)


def let_await(task: Task, wait: Await) -> None:
    """Let the body of `task` and its hooks be awaited if they are coroutine functions.

    What wraps the body from outside stays there, and sees a synchronous function. So call this
    before Celery's tracer is built: agents wrap the body then.

    Arguments:
        task: the task.
        wait: awaits.
    """
    _let_hooks_await(task, wait)
    if _IS_ASYNC in vars(task):
        return
    found = is_async(task)
    setattr(task, _IS_ASYNC, found)
    if found:
        _let_body_await(task, functools.partial(_wait_for_body, task, wait))


def _let_hooks_await(task: Task, wait: Await) -> None:
    for name in HOOKS:
        hook = getattr(task, name)
        if _is_coroutine_function(hook):
            setattr(task, name, _awaiting(hook, functools.partial(_wait_for_hook, name, wait)))


def _wait_for_hook(name: str, wait: Await, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await the hook `name`. An exception of the one before the body counts as the body's."""
    return wait(coroutine, name == "before_start")


def _wait_for_body(task: Task, wait: Await, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await the body of `task` if Celery has called it. If other code has, return the coroutine:
    that code awaits it, ``await other_task(1)``."""
    request = task.request
    if _is_called_by_celery() or _is_errback():
        return wait(coroutine, True)
    if request.called_directly or _BEGUN in vars(request):
        return coroutine
    # `Task.__call__` copies this into the request that it makes for a direct call.
    setattr(request, _BEGUN, True)
    return wait(coroutine, True)


def _is_called_by_celery() -> bool:
    """Return whether one of Celery's own tasks calls: `celery.map` and `celery.starmap` do."""
    callers = _state._task_stack.stack[-2:-1]
    return bool(callers) and str(callers[0].name).startswith(CELERY_PREFIX)


def _is_errback() -> bool:
    """Return whether Celery calls the current task as an errback.

    It sends an errback that takes only the id of the failed task. Any other it calls where it
    stores the failure, and throws away what the call returns. What calls shows only in the stack.
    """
    frame: FrameType | None = sys._getframe()
    for _ in range(_NEAR):
        if frame is None:
            return False
        if frame.f_code is _CALLS_ERRBACKS:
            return True
        frame = frame.f_back
    return False


def _let_body_await(task: Task, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    kind = type(task)
    if _is_coroutine_function(kind.__call__):
        # It calls the body itself, and awaits it.
        kind.__call__ = _awaiting(kind.__call__, wait)
        return
    body = _body(task)
    chain = list(_unwrapped(body))
    place = next(n for n, function in enumerate(chain) if _is_coroutine_function(function))
    cell = _cell_with(chain[place], chain[place - 1]) if place else None
    if cell is not None:
        # The wrapper gets the result, and not a coroutine: pydantic's makes JSON of it.
        cell.cell_contents = _awaiting(chain[place], wait)
        return
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"
    setattr(task, name, _awaiting(body, wait))


def _body(task: Task) -> Any:
    # With `autoretry_for`, `task.run` is Celery's wrapper of this (celery/app/autoretry.py).
    return getattr(task, "_orig_run", task.run)


def _awaiting(
    function: Callable[..., Any], wait: Callable[[Coroutine[Any, Any, Any]], Any]
) -> Callable[..., Any]:
    """Return a function that calls `function`, and awaits the coroutine that it returns."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        return wait(returned) if inspect.iscoroutine(returned) else returned

    return call


def _is_coroutine_function(function: Any) -> bool:
    return inspect.iscoroutinefunction(function)


def _unwrapped(function: Any) -> Iterator[Any]:
    """Yield `function`, what it wraps, and so on."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)


def _cell_with(value: Any, wrapper: Any) -> CellType | None:
    """Return the variable in which `wrapper` has the function `value` that it wraps, or None."""
    cells: tuple[CellType, ...] = getattr(wrapper, "__closure__", None) or ()
    for cell in cells:
        try:
            if cell.cell_contents is value:
                return cell
        except ValueError:
            # It is empty.
            continue
    return None


def run_to_end(coroutine: Coroutine[Any, Any, Any], interruptible: bool = True) -> Any:
    """Run `coroutine` in an event loop of its own; return its result.

    If an event loop runs in this thread, the new one runs in another, and this thread waits.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    return _run_in_thread(functools.partial(asyncio.run, coroutine))


def _run_in_thread(function: Callable[[], Any]) -> Any:
    context = contextvars.copy_context()
    ended: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((context.run(function), None))
        except BaseException as exc:
            ended.append((None, exc))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    result, error = ended.pop()
    if error is not None:
        raise error
    return result
