"""`async def` tasks for Celery's canvas, which know nothing of the pool."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Task, chain, chord, group, shared_task
from celery.exceptions import Ignore, Reject


async def wait_for_file(path: str) -> None:
    while not Path(path).exists():
        await asyncio.sleep(0.005)


def write_line(path: str, *words: Any) -> None:
    with Path(path).open("a") as file:
        print(*words, file=file)


@shared_task(name="aio.add")
async def add(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


@shared_task(name="aio.double")
async def double(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


@shared_task(name="aio.process")
async def process(*_: Any) -> int:
    await asyncio.sleep(0)
    return os.getpid()


@shared_task(name="aio.total")
async def total(numbers: list[int]) -> int:
    await asyncio.sleep(0)
    return sum(numbers)


@shared_task(name="aio.fail")
async def fail(*words: Any) -> None:
    await asyncio.sleep(0)
    raise ValueError(*words)


@shared_task(name="aio.write")
async def write(path: str, *words: Any) -> None:
    await asyncio.sleep(0)
    write_line(path, *words)


@shared_task(name="aio.errback")
async def errback(failed_id: str, *, path: str) -> None:
    """An errback that Celery sends: it takes one argument that is no keyword."""
    await write(path, "sent", failed_id)


@shared_task(name="aio.called_errback")
async def called_errback(request: Any, exc: Any, traceback: Any, path: str) -> None:
    """An errback that Celery calls where it stores the failure."""
    await asyncio.sleep(0)
    # What it calls itself, it awaits itself.
    await write(path, "called", request.id, type(exc).__name__, os.getpid())


@shared_task(name="aio.die")
async def die() -> None:
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(name="aio.replaced", bind=True)
async def replaced(self: Task, x: int, times: int) -> None:
    await asyncio.sleep(0)
    if times:
        self.replace(replaced.s(2 * x, times - 1))
    self.replace(chain(add.s(x, 1), group(double.s(), double.s()), total.s()))


@shared_task(name="aio.sends")
async def sends(x: int) -> list[str]:
    await asyncio.sleep(0)
    header = [add.s(x, number) for number in range(3)]
    return [add.delay(x, 1).id, chord(header)(total.s()).id, chain(double.s(x), double.s())().id]


@shared_task(name="aio.retried", bind=True, max_retries=2)
async def retried(self: Task, path: str, times: int) -> int:
    write_line(path, time.monotonic())
    await asyncio.sleep(0)
    if self.request.retries < times:
        raise self.retry(exc=KeyError("not yet"), countdown=0.3)
    return self.request.retries


@shared_task(
    name="aio.retries_itself",
    bind=True,
    autoretry_for=(ConnectionError,),
    default_retry_delay=0.3,
    retry_kwargs={"max_retries": 2},
)
async def retries_itself(self: Task, times: int) -> int:
    await asyncio.sleep(0)
    if self.request.retries < times:
        raise ConnectionError("not yet")
    return self.request.retries


@shared_task(name="aio.rejects", bind=True, acks_late=True)
async def rejects(self: Task, path: str, requeue: bool) -> str:
    write_line(path, "run")
    await asyncio.sleep(0)
    if not self.request.delivery_info["redelivered"]:
        raise Reject("not now", requeue=requeue)
    return "done"


@shared_task(name="aio.ignores", bind=True)
async def ignores(self: Task, state: str) -> None:
    self.update_state(state=state)
    await asyncio.sleep(0)
    raise Ignore()


@shared_task(name="aio.progress", bind=True)
async def progress(self: Task, gate: str, of: int) -> str:
    await asyncio.sleep(0)
    self.update_state(state="PROGRESS", meta={"of": of})
    await wait_for_file(gate)
    return str(self.request.id)


@shared_task(name="aio.wait")
async def wait(begun: str, gate: str, ended: str) -> int:
    """Wait for `gate`, as this process; `begun` and `ended` tell from when to when."""
    Path(begun).touch()
    try:
        await wait_for_file(gate)
        return os.getpid()
    finally:
        await asyncio.sleep(0)
        Path(ended).touch()


@shared_task(name="aio.late", bind=True, acks_late=True, reject_on_worker_lost=True)
async def late(self: Task, runs: str, gate: str) -> str:
    write_line(runs, self.request.id, os.getpid())
    await wait_for_file(gate)
    return str(self.request.id)


class Hooked(Task):
    """Writes down which hooks are called; its first argument says where."""

    async def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        await asyncio.sleep(0)
        write_line(args[0], "before_start", self.request.id == task_id)

    async def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        await asyncio.sleep(0)
        write_line(args[0], "on_success", retval, self.request.id == task_id)

    async def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        await asyncio.sleep(0)
        write_line(args[0], "on_failure", type(exc).__name__, self.request.id == task_id)

    async def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        await asyncio.sleep(0)
        write_line(args[0], "on_retry", type(exc).__name__, self.request.id == task_id)

    async def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        await asyncio.sleep(0)
        write_line(args[0], "after_return", status, self.request.id == task_id)


@shared_task(name="aio.hooked", bind=True, base=Hooked, max_retries=1)
async def hooked(self: Task, path: str, what: str) -> int:
    write_line(path, "body")
    await asyncio.sleep(0)
    if what == "fail":
        raise ValueError("no")
    if what == "retry" and not self.request.retries:
        raise self.retry(exc=KeyError("not yet"), countdown=0.3)
    return 7
