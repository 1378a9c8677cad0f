"""The messages that only Python children and tracers use: the boot line, Celery's task messages,
their ends.

They are private: the worker and its Python children have the same release of this package. A Python
child reads one `Boot`, says that it is ready as any child with a handshake does, then reads a
`TaskRequest` and writes a `Traced` or a `Returned` for each job.

An asyncio child reads an `Order` instead. It writes a `Traced`, or a `Released` if it had to end
the job.

A tracer reads a `Notice` instead, and another one for each thing that happens to the job. It writes
an `Ask` when the trace comes to the body of the task, and a `Traced` or a `Released` at the end.

Fields of type bytes hold pickles. Only the worker writes them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .json_lines import decode_line, encode
from .messages import CancelReason, Error, Ignore, Ok, Reject, Reply, Retry, Throttled

__all__ = (
    "SILENT",
    "Answer",
    "Ask",
    "AsyncioBoot",
    "Boot",
    "Exchange",
    "Notice",
    "Order",
    "Prelude",
    "Raised",
    "Released",
    "Returned",
    "SentSettings",
    "TaskMessage",
    "TaskRequest",
    "Traced",
    "decode_boot",
    "decode_notice",
    "decode_of_asyncio_child",
    "decode_of_tracer",
    "decode_order",
    "decode_request",
    "decode_traced",
    "encode_abandon",
    "encode_ask",
)


# -- the boot: the first line that a Python child reads


class SentSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The worker's configuration, without what is a default of Celery's.

    `python_child.configuration` writes and reads it.
    """

    #: Pickled values, by the names of their settings.
    values: dict[str, bytes] = {}
    #: What each setting that can't be pickled is: the name of a type or a function.
    unsendable: dict[str, str] = {}
    #: Settings in `values` that name a directory of the worker's interpreter. A child with another
    #: interpreter keeps its own value of these.
    at_home: list[str] = []


class Prelude(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the worker did before its pool started, for a Python child to repeat.

    `python_child.replay` writes and reads it.
    """

    #: What to repeat: values of `settings.REPLAYABLE`, in the order in which the worker did it.
    order: list[str] = []
    #: The names of the receivers or bootsteps that did it, by the values in `order`.
    receivers: dict[str, list[str]] = {}
    #: The project's own options of the command line (`app.user_options["preload"]`).
    preload: dict[str, bytes] = {}
    #: The options that the worker was made with.
    options: dict[str, bytes] = {}
    #: The options that the worker's bootsteps were made with.
    step_options: dict[str, bytes] = {}
    #: Plain attributes of the worker.
    worker: dict[str, bytes] = {}


class AsyncioBoot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What only asyncio children are to know."""

    #: The asynchronous context manager to enter before the first job, as ``module:name``.
    lifespan: str | None = None
    #: Seconds that code may hold up the event loop until the log says so.
    slow_callback: float = 1.0
    #: Whether the event loop is uvloop's.
    uvloop: bool = False


class Boot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a fresh interpreter becomes a process of the worker's project.

    `worker.launch` writes it, `python_child.main` and `python_child.loading` do what it says.
    """

    #: The worker's node name.
    hostname: str
    #: The app as ``-A`` takes it; or pickled, if no module has it.
    app: str | None = None
    pickled_app: bytes | None = None
    #: The worker's configuration.
    settings: SentSettings = SentSettings()
    #: What to repeat of what the worker did.
    prelude: Prelude = Prelude()
    #: What the worker's interpreter runs as ``__main__``, if the app is defined there: the name of
    #: a module, or the path of a file.
    main_module: str | None = None
    main_path: str | None = None
    #: Where to look for modules: all of ``sys.path``; or, unless `whole_path`, what to put before
    #: the child's own.
    path: list[str] = []
    whole_path: bool = True
    #: The worker's command line.
    argv: list[str] = []
    #: Configuration given on the command line as ``name=value``.
    options: list[str] = []
    #: Modules to import, of ``include`` and ``--include``.
    include: list[str] = []
    #: The module that defines each of the worker's tasks, by the tasks' names.
    tasks: dict[str, str] = {}
    #: How to make a task that no import makes (`python_child.recipes`), by the tasks' names.
    recipes: dict[str, bytes] = {}
    #: Whether it is for a tracer: `tasks` are those of external children.
    traces: bool = False
    #: Seconds that functions registered with `atexit` may take when the child exits.
    exit_grace: float = 5.0
    #: Whether a template looks whether it may be forked.
    audits: bool = True
    #: Modules that do not survive a fork, beside those that are known.
    not_forkable: list[str] = []
    #: For an asyncio child.
    aio: AsyncioBoot | None = None


# -- requests


class TaskMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payload for a Python child: Celery's task message before it is deserialized; or a call.

    It has one of three forms: `request` with `body` or `raw`; `pickled`; `call`.
    """

    #: The name of the task, or of the callable.
    task: str
    content_type: str | None = None
    content_encoding: str | None = None
    #: The message's headers and delivery info.
    request: dict[str, Any] | None = None
    #: The message's body as text.
    body: str | None = None
    #: The message's body, if it is not text. This is the message's own bytes, not a pickle.
    raw: bytes | None = None
    #: `request` and the body, if JSON would change them.
    pickled: bytes | None = None
    #: A callable that is not a task, its positional and its keyword arguments.
    call: bytes | None = None


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to a Python child."""

    id: str
    payload: TaskMessage


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What an asyncio child reads about a job: a request, or later that it has to end the job."""

    id: str
    payload: TaskMessage | None = None
    cancel: CancelReason | None = None


# -- what a tracer reads


class Exchange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tracer must know of the exchange with an external child."""

    #: The child's pid, for the state STARTED.
    pid: int
    #: How often the task may be throttled; None is without limit.
    throttle_max_retries: int | None = None
    #: Whether the state is to be STARTED while the child works.
    tracked: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the exchange with an external child ended. It has one of three forms."""

    #: The child's reply; with `over`, if the child was told before that its soft limit is over.
    reply: Ok | Error | Throttled | Retry | Reject | Ignore | None = None
    #: What is wrong with what the child wrote.
    fault: str | None = None
    #: The soft limit in seconds. Without `reply`, the child did not end the job.
    over: float | None = None


class Notice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tracer reads about a job. First comes `payload`, then any of the others."""

    id: str
    payload: TaskMessage | None = None
    #: Beside `payload`: there is an external child. Without it, the tracer runs the task's body.
    exchange: Exchange | None = None
    #: What the child told of its progress.
    progress: dict[str, Any] | None = None
    #: How the exchange ended.
    answer: Answer | None = None
    #: The job has ended in another way; whether it was revoked.
    abandon: bool | None = None
    #: Instead of `payload`: the name of the task. The tracer looks whether the result backend
    #: answers, and replies then.
    probe: str | None = None


# -- what a tracer writes

#: The feature that a tracer announces if nobody watches the tasks of external children there.
SILENT = "silent"


class Ask(msgspec.Struct, tag_field="status", tag="ask", frozen=True, kw_only=True):
    """The trace of the job `id` has come to the body of the task."""

    id: str
    #: The request for the external child.
    request: msgspec.Raw

    @property
    def line(self) -> bytes:
        """The request as a line."""
        return bytes(self.request) + b"\n"


class Released(Reply, tag="released", frozen=True, kw_only=True):
    """The tracer or asyncio child has let go of a job that has ended in another way. It stores no
    more states."""


# -- replies


class Raised(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An exception from a Python child, in the terms of Celery's JSON results."""

    #: The name of its class, and the class's module.
    type: str
    module: str | None = None
    #: Its arguments, as far as JSON can hold them.
    args: Any = ()
    #: The traceback as text, with the exception's own line.
    traceback: str = ""
    #: Whether Celery's tracer raised it, or made it of the task's exception.
    internal: bool = False
    #: For a `celery.exceptions.Retry`: the task's exception, or the reason as text.
    cause: Raised | str | None = None
    #: For a `Retry`: its message, and when to try again.
    message: str | None = None
    when: Any = None
    #: For a `celery.exceptions.Reject`.
    requeue: bool = False


class Traced(Reply, tag="traced", frozen=True, kw_only=True, omit_defaults=True):
    """How a Python child's own trace of a task ended; or the exception that a call raised."""

    #: The repr of the result, if the task succeeded.
    result: str | None = None
    #: Seconds that the task took, if the tracer told.
    runtime: float | None = None
    #: The exception, if it did not succeed.
    raised: Raised | None = None
    #: Whether the tracer itself failed, and has stored nothing; or a call raised.
    escaped: bool = False


class Returned(Reply, tag="returned", frozen=True, kw_only=True, omit_defaults=True):
    """What a callable that is not a task returned in a Python child."""

    #: The value, if JSON holds it exactly. Tuples count: they become lists.
    value: Any = None
    #: Otherwise the repr of the value.
    words: str | None = None


# -- decoding

_boots: msgspec.json.Decoder[Boot] = msgspec.json.Decoder(Boot)
_requests: msgspec.json.Decoder[TaskRequest] = msgspec.json.Decoder(TaskRequest)
_traced: msgspec.json.Decoder[Traced | Returned] = msgspec.json.Decoder(Traced | Returned)
_orders: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
_of_asyncio_children: msgspec.json.Decoder[Traced | Released] = msgspec.json.Decoder(
    Traced | Released
)
_notices: msgspec.json.Decoder[Notice] = msgspec.json.Decoder(Notice)
_of_tracers: msgspec.json.Decoder[Traced | Released | Ask] = msgspec.json.Decoder(
    Traced | Released | Ask
)


def decode_boot(line: bytes) -> Boot:
    """Decode the first line that a Python child reads."""
    return _boots.decode(line)


def decode_request(line: bytes) -> TaskRequest:
    """Decode any later line that a Python child reads."""
    return _requests.decode(line)


def decode_traced(line: bytes) -> Traced | Returned:
    """Decode one line that a Python child wrote after its boot.

    Raises:
        ProtocolFault: the line is no such message. The text says why and quotes its start.
    """
    return decode_line(_traced, line)


def decode_order(line: bytes) -> Order:
    """Decode any later line that an asyncio child reads."""
    return _orders.decode(line)


def decode_of_asyncio_child(line: bytes) -> Traced | Released:
    """Decode one line that an asyncio child wrote after its boot. Errors are those of
    `decode_traced`."""
    return decode_line(_of_asyncio_children, line)


def decode_notice(line: bytes) -> Notice:
    """Decode any later line that a tracer reads."""
    return _notices.decode(line)


def decode_of_tracer(line: bytes) -> Traced | Released | Ask:
    """Decode one line that a tracer wrote after its boot. Errors are those of `decode_traced`."""
    return decode_line(_of_tracers, line)


# -- encoding


def encode_ask(task_id: str, line: bytes) -> bytes:
    """Encode that the trace of a job needs its exchange; `line` is the request."""
    return encode(Ask(id=task_id, request=msgspec.Raw(line.rstrip(b"\n"))))


def encode_abandon(task_id: str, revoked: bool) -> bytes:
    """Encode as a line for a tracer that a job has ended in another way."""
    return encode(Notice(id=task_id, abandon=revoked))
