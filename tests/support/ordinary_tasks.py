"""An ordinary Celery project's tasks, which know nothing of the pool."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import Task, shared_task, signals
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)


class ProjectError(Exception):
    """An error of the project's own."""

    def __init__(self, code: int, hint: str) -> None:
        super().__init__(code, hint)
        self.code = code
        self.hint = hint


class Unpicklable(Exception):
    """An error that neither pickle nor JSON can hold."""

    def __init__(self, thing: Any) -> None:
        super().__init__(thing)
        self.lock = threading.Lock()


class BareCancel(BaseException):
    """As some libraries' time-outs and cancellations: not an `Exception`."""


def wait_for_file(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.005)


@shared_task(name="echo")
def echo(*args: Any, **kwargs: Any) -> Any:
    return [list(args), kwargs]


@shared_task(name="add")
def add(x: Any, y: Any) -> Any:
    return x + y


@shared_task(name="total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(name="size")
def size(text: str, length: int) -> tuple[int, str]:
    return len(text), "y" * length


@shared_task(name="facts", bind=True)
def facts(self: Task) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "executable": sys.executable,
        "version": list(sys.version_info[:2]),
        "cwd": os.getcwd(),
        "argv": sys.argv,
        "environ": dict(os.environ),
        "nice": os.nice(0),
        "session": os.getsid(0),
        "hostname": self.request.hostname,
        "app": self.app.main,
        "index": multiprocessing.current_process().name,
        "delivery": self.request.delivery_info,
        "headers": self.request.headers,
        "priority": self.request.delivery_info["priority"],
        "current_app": current_app_is(self.app),
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


def current_app_is(app: Any) -> bool:
    from celery import current_app

    return current_app._get_current_object() is app


@shared_task(name="header", bind=True)
def header(self: Task, name: str) -> Any:
    value = (self.request.headers or {}).get(name, getattr(self.request, name, None))
    return [type(value).__name__, str(value)]


@shared_task(name="descriptors")
def descriptors() -> dict[int, str]:
    folder = Path("/proc/self/fd")
    found = {}
    for entry in folder.iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            continue
    return found


@shared_task(name="fail")
def fail(kind: str) -> None:
    errors: dict[str, BaseException] = {
        "value": ValueError("no such", 5),
        "key": KeyError("k"),
        "project": ProjectError(7, "try tea"),
        "unpicklable": Unpicklable(object()),
        "unicode": ValueError("\ud800 \u2028"),
        "long": ValueError("x" * 3_000_000),
        "base": BareCancel("stop"),
        "memory": MemoryError("none left"),
        "interrupt": KeyboardInterrupt(),
        "exit": SystemExit(3),
        "exit text": SystemExit("bye"),
        "exit none": SystemExit(),
    }
    raise errors[kind]


@shared_task(name="throws", throws=(ProjectError,))
def throws() -> None:
    raise ProjectError(1, "expected")


#: Seconds. Celery sends a retry before it stores that there is one, which must not come last.
RETRY_DELAY = 0.3


@shared_task(name="retrying", bind=True, max_retries=2, default_retry_delay=RETRY_DELAY)
def retrying(self: Task, until: int) -> int:
    if self.request.retries < until:
        raise self.retry(exc=ProjectError(self.request.retries, "again"))
    return int(self.request.retries)


@shared_task(
    name="autoretrying", bind=True, autoretry_for=(ValueError,), default_retry_delay=RETRY_DELAY
)
def autoretrying(self: Task) -> int:
    if self.request.retries < 2:
        raise ValueError("not yet")
    return int(self.request.retries)


@shared_task(name="ignoring")
def ignoring() -> None:
    raise Ignore()


@shared_task(name="rejecting", acks_late=True)
def rejecting(path: str, requeue: bool) -> str:
    if Path(path).exists():
        return "delivered again"
    Path(path).touch()
    raise Reject(ValueError("not mine"), requeue=requeue)


@shared_task(name="die")
def die(how: str) -> None:
    if how == "os._exit":
        os._exit(4)
    elif how == "segfault":
        ctypes.string_at(0)
    else:
        os.kill(os.getpid(), getattr(signal, how))


@shared_task(name="die_once", acks_late=True, reject_on_worker_lost=True)
def die_once(path: str) -> str:
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "delivered again"


@shared_task(
    name="retried_when_lost",
    bind=True,
    retry_on_worker_lost=True,
    acks_late=True,
    max_retries=5,
    default_retry_delay=RETRY_DELAY,
)
def retried_when_lost(self: Task, deaths: int) -> int:
    if self.request.retries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    retries: int = self.request.retries
    return retries


@shared_task(name="fail_unacked", acks_late=True, acks_on_failure_or_timeout=False)
def fail_unacked(path: str) -> None:
    with open(path, "a") as file:
        file.write("run\n")
    raise ProjectError(7, path)


@shared_task(name="soft", bind=True)
def soft(self: Task, stubborn: bool = False) -> str:
    try:
        wait_for_file("/nowhere")
    except SoftTimeLimitExceeded:
        if stubborn:
            wait_for_file("/nowhere")
        return "cleaned up"
    return "never"


@shared_task(name="wait")
def wait(begun: str, gate: str, finally_path: str = "") -> int:
    Path(begun).touch()
    try:
        wait_for_file(gate)
    finally:
        if finally_path:
            Path(finally_path).touch()
    return os.getpid()


@shared_task(name="progress", bind=True)
def progress(self: Task, gate: str) -> str:
    self.update_state(state="PROGRESS", meta={"done": 50})
    wait_for_file(gate)
    return "done"


@shared_task(name="started", track_started=True)
def started(gate: str) -> int:
    wait_for_file(gate)
    return os.getpid()


@shared_task(name="noisy")
def noisy() -> str:
    print("a print")
    sys.stdout.write("a write\n")
    os.write(1, b'{"id":"x","status":"ok"}\n')
    os.write(1, b"raw bytes\n")
    subprocess.run(["sh", "-c", "echo from a program; cat"], check=True)
    print("to stderr", file=sys.stderr)
    return sys.stdin.read()


@shared_task(name="asking")
def asking() -> str:
    return input("name? ")


@shared_task(name="breaking_stdout", acks_late=True, reject_on_worker_lost=True)
def breaking_stdout(how: str) -> int:
    """Leave a stdout behind that is none."""

    class Broken:
        def write(self, text: str) -> None: ...

    class Raising(Broken):
        def flush(self) -> None:
            raise RuntimeError("no flush")

    streams: dict[str, Any] = {"no flush": Broken(), "raising": Raising(), "none": None}
    sys.stdout = streams[how]
    return os.getpid()


@shared_task(name="odd_retry", acks_late=True)
def odd_retry() -> None:
    raise Retry("in words", when=timedelta(seconds=3))


@shared_task(name="closing")
def closing() -> None:
    """Do to the standard descriptors what a careless library would."""
    for descriptor in (0, 1):
        with suppress(OSError):
            os.close(descriptor)


@shared_task(name="logging_task")
def logging_task(word: str) -> int:
    logger.warning("heard %s", word)
    return os.getpid()


def double(number: int) -> int:
    return number * 2


@shared_task(name="processes")
def processes(method: str) -> list[int]:
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool, ProcessPoolExecutor(2, context) as executor:
        return pool.map(double, [1, 2]) + list(executor.map(double, [3, 4]))


@shared_task(name="half_idle")
def half_idle(method: str, begun: str, ended: str) -> None:
    """Have a process wait for ever and another for something to do; tell of the end."""
    try:
        with multiprocessing.get_context(method).Pool(2) as pool:
            pool.map(double, range(2))
            pool.apply_async(wait_for_file, ("/nowhere",))
            Path(begun).touch()
            wait_for_file("/nowhere")
    finally:
        Path(ended).touch()


@shared_task(name="forking")
def forking() -> int:
    """Fork, and let the copy go on where the task returns."""
    parent = os.getpid()
    os.fork()
    return parent


@shared_task(name="end_copy")
def end_copy(own_handler: bool) -> int:
    """Fork, send the copy SIGTERM, and return its exit status."""
    before = signal.getsignal(signal.SIGTERM)
    if own_handler:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    signal.signal(signal.SIGTERM, before)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@shared_task(name="thread_left")
def thread_left() -> None:
    """Leave a thread behind that never ends."""
    threading.Thread(target=wait_for_file, args=("/nowhere",)).start()


@shared_task(name="sockets")
def sockets() -> int:
    """Return how many of this process' descriptors are sockets."""
    count = 0
    for number in descriptors():
        try:
            with socket.socket(fileno=os.dup(number)):
                count += 1
        except OSError:
            continue
    return count


@shared_task(name="joining")
def joining() -> Any:
    return echo.delay(1).get(timeout=5)


@shared_task(name="calls")
def calls(name: str, *args: Any) -> Any:
    """Send another task, as projects do; return its id."""
    from celery import current_app

    return current_app.send_task(name, args).id


@shared_task(name="log_pid", ignore_result=True)
def log_pid(path: str, number: int) -> None:
    with open(path, "a") as file:
        file.write(f"{number} {os.getpid()}\n")


def _note(event: str) -> None:
    path = os.environ.get("SIGNALS_LOG")
    if path:
        with open(path, "a") as file:
            file.write(f"{event} {os.getpid()}\n")


@signals.worker_process_init.connect
def on_init(**_: Any) -> None:
    _note("init")


@signals.worker_process_shutdown.connect
def on_shutdown(pid: int, exitcode: int, **_: Any) -> None:
    _note(f"shutdown:{exitcode}:{pid == os.getpid()}")


@signals.worker_init.connect
def on_worker_init(**_: Any) -> None:
    _note("worker")


def on_prerun(**_: Any) -> None:
    _note("prerun")


def on_postrun(**_: Any) -> None:
    _note("postrun")


# In a worker, receivers have each job of its external children traced from the start.
if {"OBSERVED", "CELERY_SUBPROC_POOL_SLOT"} & os.environ.keys():
    signals.task_prerun.connect(on_prerun)
    signals.task_postrun.connect(on_postrun)
