"""What only Python children say and hear: how to boot, Celery's task messages, how traces end."""

from __future__ import annotations

from typing import Any

import msgspec

from .messages import Reply, decode_line

__all__ = (
    "Boot",
    "Raised",
    "Returned",
    "TaskMessage",
    "TaskRequest",
    "Traced",
    "decode_boot",
    "decode_request",
    "decode_traced",
)


class Raised(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a task in a Python child raised, in the words of Celery's JSON results."""

    #: The name of its class, and the module that the class is from.
    type: str
    module: str | None = None
    #: Its arguments, as far as JSON can hold them.
    args: Any = ()
    #: The traceback as text, with the exception's own line.
    traceback: str = ""
    #: Whether Celery's tracer raised it, or made it of what the task raised.
    internal: bool = False
    #: Of a `celery.exceptions.Retry`: what the task had raised, or why it is retried, and when.
    cause: Raised | str | None = None
    message: str | None = None
    when: Any = None
    #: Of a `celery.exceptions.Reject`.
    requeue: bool = False


class Traced(Reply, tag="traced", frozen=True, kw_only=True, omit_defaults=True):
    """How a Python child's own trace of the task ended."""

    #: The result's repr, if the task succeeded.
    result: str | None = None
    #: Seconds that the task took, if the tracer told.
    runtime: float | None = None
    #: What became of it otherwise.
    raised: Raised | None = None
    #: Whether the tracer itself failed, and has stored nothing.
    escaped: bool = False


class Returned(Reply, tag="returned", frozen=True, kw_only=True, omit_defaults=True):
    """What a callable that is no task has returned, in a Python child."""

    #: As JSON holds it exactly, but for tuples, which become lists.
    value: Any = None
    #: Otherwise its repr.
    words: str | None = None


class SentSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker's configuration has beside Celery's defaults."""

    #: The pickled value of each setting.
    values: dict[str, bytes] = {}
    #: Settings that can't be pickled, with what they are: the name of a type or a function.
    unsendable: dict[str, str] = {}
    #: Settings that name a place of the worker's own interpreter, for a child that has another one.
    at_home: list[str] = []


class Prelude(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker has done before its pool started, for a Python child to do again."""

    #: What to do again: names of `settings.REPLAYABLE`, in the order in which the worker did it.
    order: list[str] = []
    #: Whose work that was, by the same names.
    receivers: dict[str, list[str]] = {}
    #: The project's own options of the command line (`app.user_options["preload"]`), pickled.
    preload: dict[str, bytes] = {}
    #: The options that the worker was made with, and those that its bootsteps were: pickled.
    options: dict[str, bytes] = {}
    step_options: dict[str, bytes] = {}
    #: Plain attributes of the worker, pickled.
    worker: dict[str, bytes] = {}


class Boot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first line that a Python child gets: how to become a process of its worker's project."""

    #: The worker's node name.
    hostname: str
    #: The app as ``-A`` takes it, or pickled if it can't be imported from anywhere.
    app: str | None = None
    pickled_app: bytes | None = None
    #: The worker's configuration.
    settings: SentSettings = SentSettings()
    #: What to do again of what the worker did.
    prelude: Prelude = Prelude()
    #: What the worker's interpreter runs as ``__main__``, if the app is from there: the name of a
    #: module, or else the path of a file.
    main_module: str | None = None
    main_path: str | None = None
    #: Where to look for modules: all of ``sys.path``, or what is to stand before the child's own.
    path: list[str] = []
    whole_path: bool = True
    #: The worker's command line.
    argv: list[str] = []
    #: Configuration given there as ``name=value``.
    options: list[str] = []
    #: Modules to import, of ``include`` and ``--include``.
    include: list[str] = []
    #: The modules in which the worker's tasks are defined, by the tasks' names.
    tasks: dict[str, str] = {}
    #: How to make a task that no import makes: pickled `messages.Recipe`, by name.
    recipes: dict[str, bytes] = {}
    #: Seconds that what is registered with `atexit` may take when the child goes.
    exit_grace: float = 5.0


class TaskMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payload for a Python child: Celery's task message, still to be deserialized."""

    task: str
    content_type: str | None = None
    content_encoding: str | None = None
    #: Headers and delivery info.
    request: dict[str, Any] | None = None
    #: The body: as text, or bytes that are no text.
    body: str | None = None
    raw: bytes | None = None
    #: Instead of `request` and `body`, if JSON would change them: both, pickled.
    pickled: bytes | None = None
    #: Instead of a message: a callable that is no task, whose name is `task`, and its positional
    #: and keyword arguments, pickled.
    call: bytes | None = None


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to a Python child."""

    id: str
    payload: TaskMessage


_boots: msgspec.json.Decoder[Boot] = msgspec.json.Decoder(Boot)
_requests: msgspec.json.Decoder[TaskRequest] = msgspec.json.Decoder(TaskRequest)
_traced: msgspec.json.Decoder[Traced | Returned] = msgspec.json.Decoder(Traced | Returned)


def decode_traced(line: bytes) -> Traced | Returned:
    """Decode one line of a Python child's stdout: how a trace ended, or what a callable has
    returned. As `decode_reply`."""
    return decode_line(_traced, line)


def decode_boot(line: bytes) -> Boot:
    """Decode the first line that a Python child reads."""
    return _boots.decode(line)


def decode_request(line: bytes) -> TaskRequest:
    """Decode every other line that a Python child reads."""
    return _requests.decode(line)
