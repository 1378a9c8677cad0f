"""The `async def` tasks of tests."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Task, current_task, shared_task, signals
from celery.exceptions import SoftTimeLimitExceeded
from ordinary_tasks import wait as wait_for_gate

#: What a task binds, and no other may see.
mine: contextvars.ContextVar[str] = contextvars.ContextVar("mine", default="nobody's")
from_prerun: contextvars.ContextVar[str] = contextvars.ContextVar("from_prerun", default="none")
after_body: dict[str, str] = {}


@signals.task_prerun.connect(weak=False)
def on_prerun(task_id: str, **_: Any) -> None:
    from_prerun.set(task_id)


@shared_task(name="aio.add")
async def add(x: Any, y: Any) -> Any:
    await asyncio.sleep(0)
    return x + y


@shared_task(name="aio.pid")
async def pid() -> int:
    return os.getpid()


@shared_task(name="aio.raises")
async def raises() -> None:
    await asyncio.sleep(0)
    raise ValueError("boom")


# -- how a coroutine function is hidden


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        # A decorator for ordinary functions sees the result.
        return [*result, "decorated"]

    return wrapper


def decorated_for_coroutines(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return [*(await function(*args, **kwargs)), "decorated"]

    return wrapper


@shared_task(name="aio.decorated")
@decorated
async def with_decorator(word: str) -> list[str]:
    await asyncio.sleep(0)
    return [word]


@shared_task(name="aio.decorated_for_coroutines")
@decorated_for_coroutines
async def with_async_decorator(word: str) -> list[str]:
    await asyncio.sleep(0)
    return [word]


@shared_task(name="aio.bound", bind=True)
async def bound(self: Task, word: str) -> list[str]:
    await asyncio.sleep(0)
    return [word, self.request.id]


async def _of_partial(word: str, other: str) -> list[str]:
    await asyncio.sleep(0)
    return [word, other]


class OfPartial(Task):
    # Celery's decorator takes no `functools.partial` (5.7).
    name = "aio.partial"
    run = staticmethod(functools.partial(_of_partial, other="partial"))


class OfClass(Task):
    name = "aio.class"

    async def run(self, word: str) -> list[str]:
        await asyncio.sleep(0)
        return [word, self.request.id]


class WithCall(Task):
    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return [*super().__call__(*args, **kwargs), "called"]


@shared_task(name="aio.with_call", base=WithCall)
async def with_call(word: str) -> list[str]:
    await asyncio.sleep(0)
    return [word]


class WithAsyncCall(Task):
    abstract = True

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return [*(await self.run(*args, **kwargs)), "called"]


@shared_task(name="aio.with_async_call", base=WithAsyncCall)
async def with_async_call(word: str) -> list[str]:
    await asyncio.sleep(0)
    return [word]


@shared_task(
    name="aio.autoretried",
    bind=True,
    autoretry_for=(ValueError,),
    retry_kwargs={"countdown": 0.3, "max_retries": 2},
)
async def autoretried(self: Task, word: str) -> list[Any]:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise ValueError(word)
    return [word, self.request.retries]


# -- in which context


async def look(task: Task, token: str) -> list[str]:
    """Return what is wrong with what a coroutine or thread sees."""
    await asyncio.sleep(0.001)
    return look_now(task, token)


def look_now(task: Task, token: str) -> list[str]:
    seen = (task.request.args[0], current_task.request.args[0], mine.get(), from_prerun.get())
    expected = (token, token, token, task.request.id)
    return [] if seen == expected else [f"{seen} is not {expected}"]


@shared_task(name="aio.contexts", bind=True)
async def contexts(self: Task, token: str) -> list[str]:
    wrong = [] if mine.get() == "nobody's" else [mine.get()]
    mine.set(token)
    wrong += look_now(self, token)
    for each in await asyncio.gather(look(self, token), look(self, token)):
        wrong += each
    wrong += await asyncio.create_task(look(self, token))
    wrong += await asyncio.to_thread(look_now, self, token)
    if sys.version_info >= (3, 11):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(look(self, token))
        wrong += task.result()
    return wrong + look_now(self, token)


@signals.task_postrun.connect(weak=False)
def on_postrun(task: Task, task_id: str, **_: Any) -> None:
    if task.name == "aio.contexts":
        after_body[task_id] = mine.get()


@shared_task(name="aio.after_body")
async def what_postrun_saw(task_id: str) -> str | None:
    return after_body.get(task_id)


@shared_task(name="aio.calls")
async def calls() -> list[Any]:
    """Call other tasks directly, and by `apply`."""
    direct = await add(1, 2)
    eager = add.apply((3, 4)).result
    own = add.apply_async((5, 6))
    return [direct, eager, bool(own.id)]


# -- until something is there


async def exists(path: str) -> None:
    while not Path(path).exists():
        await asyncio.sleep(0.01)


@shared_task(name="aio.wait")
async def wait(begun: str, gate: str) -> str:
    Path(begun).touch()
    await exists(gate)
    return "done"


@shared_task(name="aio.notes_end")
async def notes_end(begun: str, ended: str) -> None:
    Path(begun).touch()
    try:
        await asyncio.Event().wait()
    except BaseException as exc:
        Path(ended).write_text(type(exc).__name__)
        raise


@shared_task(name="aio.swallows")
async def swallows(begun: str) -> None:
    Path(begun).touch()
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue


@shared_task(name="aio.blocks")
async def blocks(begun: str, gate: str) -> str:
    wait_for_gate(begun, gate)
    return "done"


@shared_task(name="aio.exits")
async def exits(begun: str) -> None:
    Path(begun).touch()
    os._exit(3)


@shared_task(name="aio.sys_exit")
async def sys_exit() -> None:
    await asyncio.sleep(0)
    sys.exit(3)


@shared_task(name="aio.cancels_itself")
async def cancels_itself() -> None:
    current = asyncio.current_task()
    assert current is not None
    current.cancel()
    await asyncio.sleep(1)


# -- hooks


class WithHooks(Task):
    abstract = True

    async def note(self, *words: str) -> None:
        await asyncio.sleep(0)
        with Path(self.request.args[0]).open("a") as file:
            file.write(" ".join(words) + "\n")

    async def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        await self.note("before_start", task_id)

    async def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        await self.note("on_success", task_id)

    async def on_failure(self, exc: Any, task_id: str, *_: Any) -> None:
        with Path(self.request.args[0] if self.request.args else _[0][0]).open("a") as file:
            await asyncio.sleep(0)
            file.write(f"on_failure {task_id} {type(exc).__name__}\n")

    async def after_return(self, status: str, retval: Any, task_id: str, *_: Any) -> None:
        await asyncio.sleep(0)


@shared_task(name="aio.with_hooks", base=WithHooks)
async def with_hooks(notes: str, fails: bool) -> None:
    await asyncio.sleep(0)
    if fails:
        raise ValueError("boom")


@shared_task(name="plain.with_hooks", base=WithHooks)
def plain_with_hooks(notes: str, fails: bool) -> None:
    if fails:
        raise ValueError("boom")


@shared_task(name="aio.hooks_and_limit", base=WithHooks)
async def hooks_and_limit(notes: str) -> None:
    await asyncio.Event().wait()


# -- soft limits


@shared_task(name="aio.soft")
async def soft(where: str) -> str:
    """Let the soft limit come `where`, and return where it was seen."""
    try:
        await WAITS[where]()
    except SoftTimeLimitExceeded:
        # It goes on after it: it is no cancellation any more.
        await asyncio.sleep(0.01)
        return "caught"
    return "not seen"


async def _forever() -> None:
    await asyncio.Event().wait()


class _Cleaning:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        assert kind is not None
        assert issubclass(kind, SoftTimeLimitExceeded), kind
        await asyncio.sleep(0.01)


async def _in_async_with() -> None:
    async with _Cleaning():
        await _forever()


async def _in_timeout() -> None:
    if sys.version_info >= (3, 11):
        async with asyncio.timeout(1000):
            await _forever()
    await asyncio.wait_for(_forever(), 1000)


async def _in_gather() -> None:
    await asyncio.gather(_forever(), _forever())


async def _in_shield() -> None:
    await asyncio.shield(asyncio.sleep(2))


async def _inner_of_group(ended: list[str]) -> None:
    try:
        await _forever()
    finally:
        ended.append("inner")


async def _in_group() -> None:
    """The body of the group has ended: it waits for its tasks."""
    if sys.version_info < (3, 11):
        await _forever()
        return
    ended: list[str] = []
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_inner_of_group(ended))
    finally:
        assert ended == ["inner"], ended


async def _in_thread() -> None:
    await asyncio.to_thread(time.sleep, 2)


WAITS = {
    "sleep": _forever,
    "async with": _in_async_with,
    "timeout": _in_timeout,
    "gather": _in_gather,
    "shield": _in_shield,
    "group": _in_group,
    "thread": _in_thread,
}


@shared_task(name="aio.ignores_soft_limit")
async def ignores_soft_limit(begun: str, seconds: float) -> str:
    Path(begun).touch()
    try:
        await asyncio.Event().wait()
    except SoftTimeLimitExceeded:
        await asyncio.sleep(seconds)
    return "done"


@shared_task(name="aio.soft_in_body_of_group")
async def soft_in_body_of_group() -> None:
    """Do not catch it: a `TaskGroup` may make a group of it."""
    if sys.version_info < (3, 11):
        await _forever()
        return
    async with asyncio.TaskGroup() as group:
        group.create_task(_forever())
        await _forever()


# -- what is left


left: list[str] = []


async def _stays(token: str) -> None:
    await asyncio.sleep(0.05)
    left.append(f"{token} {mine.get()}")


@shared_task(name="aio.leaves")
async def leaves(token: str) -> None:
    mine.set(token)
    # The event loop has only weak references.
    kept.add(asyncio.create_task(_stays(token)))


kept: set[Any] = set()


@shared_task(name="aio.left")
async def what_was_left() -> list[str]:
    return left


@shared_task(name="aio.threads")
async def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
