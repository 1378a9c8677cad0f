"""Callables that somebody gives to a worker's pool, none of them a task; and how he does it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from celery.worker.control import control_command

#: What cases have under way.
handles: dict[str, Any] = {}


def echo(*args: Any, **kwargs: Any) -> Any:
    return {"args": args, "kwargs": kwargs}


def kinds(*args: Any, **kwargs: Any) -> list[str]:
    return [repr(args), repr(kwargs)]


def pid() -> int:
    return os.getpid()


def same(value: Any) -> Any:
    return value


def long_text(length: int) -> str:
    return "x" * length


def large_number() -> Any:
    """Larger than Python writes at all."""
    return 10**5000


def circle() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


def a_lambda() -> Any:
    return lambda: None


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def unspeakable() -> Any:
    return Unspeakable()


class Callee:
    """Called itself, or by its method."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, more: int) -> int:
        return self.number + more

    def add(self, more: int) -> int:
        return self.number + more


class Odd(Exception):
    """Neither pickle nor JSON holds it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args or [threading.Lock()])


def fail(kind: str) -> None:
    raise {"value": ValueError("no such", 5), "memory": MemoryError("none"), "odd": Odd()}[kind]


def leave(status: int) -> None:
    sys.exit(status)


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def wait(begun: str, gate: str) -> str:
    Path(begun).touch()
    while not Path(gate).exists():
        time.sleep(0.005)
    return "done"


def wait_until_told(begun: str, gate: str) -> str:
    from celery.exceptions import SoftTimeLimitExceeded

    try:
        return wait(begun, gate)
    except SoftTimeLimitExceeded:
        return "told"


def of_the_worker_alone() -> Any:
    """A function of a module that is nowhere but in this process."""
    module = types.ModuleType("only_here")
    exec("def function(): return 1", module.__dict__)
    sys.modules["only_here"] = module
    return module.function


class Answers:
    """Has every attribute."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __reduce__(self) -> Any:
        # Up to Python 3.10, pickle asks for more.
        return Answers, ()

    def __call__(self) -> int:
        return 42


def circular_wrapper() -> Any:
    def function() -> None: ...

    function.__wrapped__ = function  # type: ignore[attr-defined]
    return function


#: What a test can't send: callable and arguments, made in the worker.
MADE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "kinds": lambda: (kinds, (1, (2,), date(2026, 11, 25), {3}), {"key": b"\xff"}),
    "a lambda": lambda: (lambda: None,),
    "a lock": lambda: (echo, (1, threading.Lock())),
    "a named lock": lambda: (echo, (), {"lock": threading.Lock()}),
    "a circular wrapper": lambda: (circular_wrapper(),),
    "only in the worker": lambda: (of_the_worker_alone(),),
    "nothing": lambda: (None,),
    "an object": lambda: (Callee(40), (2,)),
    "a method": lambda: (Callee(40).add, (2,)),
    "what answers oddly": lambda: (Answers(),),
    "a builtin": lambda: (max, (40, 42)),
}


@control_command()
def call(
    state: Any,
    path: str,
    target: str,
    args: tuple[Any, ...] = (),
    kwargs: Any = None,
    silent: str = "",
    **options: Any,
) -> Any:
    """Have the pool call `target`; write to the file `path` what it says of it, a line each."""
    made = MADE[target]() if target in MADE else (globals()[target], tuple(args), kwargs or {})
    if not silent:
        options.update(_listeners(path))
    elif silent == "None":
        options.update(dict.fromkeys(_listeners(path)))
    handles[path] = state.consumer.pool.apply_async(*made, **options)
    return {"ok": "called"}


@control_command()
def end(state: Any, path: str, signal_name: str | None = None) -> Any:
    """End the job of which `path` is told."""
    handles[path].terminate(getattr(signal, signal_name or "SIGTERM"))
    return {"ok": "ended"}


def _listeners(path: str) -> dict[str, Callable[..., None]]:
    def tell(what: str, *facts: Any) -> None:
        with Path(path).open("a") as file:
            file.write(json.dumps([what, *facts]) + "\n")

    def error(einfo: Any) -> None:
        exc = getattr(einfo.exception, "exc", einfo.exception)
        tell("error", type(exc).__name__, str(exc), str(einfo.traceback))

    return {
        "callback": lambda value: tell("result", type(value).__name__, repr(value)[:200]),
        "error_callback": error,
        "accept_callback": lambda pid, accepted: tell("accepted", pid),
        "timeout_callback": lambda soft, timeout: tell("timeout", soft, timeout),
    }


def told(path: Path) -> Iterator[list[Any]]:
    """Yield what `call` was told so far."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())
