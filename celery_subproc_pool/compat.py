"""What the versions of Celery and kombu need done differently: all of it stands here.

Layer: above `outcome`, below all that meets Celery; imports Celery and kombu.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

import celery
from billiard.exceptions import TimeLimitExceeded
from celery import Celery, Task, _state, signals
from celery.app import trace
from celery.app.task import Context
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.backends.base import DisabledBackend
from celery.exceptions import TaskRevokedError
from celery.states import REVOKED
from celery.utils.log import get_logger
from celery.worker.request import Request
from kombu.message import Message

from .outcome import exception_info

__all__ = (
    "acknowledge_early",
    "app_argument",
    "as_current",
    "block_joins",
    "deserialized_body",
    "ignores_result",
    "install_fixups",
    "is_at_body",
    "is_cancelled",
    "is_observed",
    "is_tracer",
    "is_unacknowledged",
    "live_receivers",
    "may_be_observed",
    "reject",
    "report_hard_timeout",
    "resolve_auto_concurrency",
    "run_queued_acks",
    "store_revoked_again",
)

logger = get_logger(__name__)


#: Celery's tracers of task messages (5.3 to 5.7).
_TRACERS = (fast_trace_task, trace_task_ret)


def is_tracer(target: Any, arguments: Sequence[Any], callback: Any) -> bool:
    """Return whether `target`, which the pool is to call, traces a task's message: it is Celery's
    own tracer, or what somebody has wrapped around it or put into its place.

    Arguments:
        target: what `apply_async` was given.
        arguments: its arguments.
        callback: one of those that `apply_async` was given. What a `Request` has called with its
            own message traces that message, whatever it is.
    """
    if target is fast_trace_task:
        return True
    request = _request_of(callback)
    if request is not None and len(arguments) == 6 and arguments[1] == request.id:
        return True
    return any(_unwrapped(target) is _unwrapped(tracer) for tracer in _TRACERS)


def _unwrapped(function: Any) -> Any:
    """Return what was wrapped, as `functools.wraps` and wrapt tell; `function` itself otherwise."""
    try:
        return inspect.unwrap(function)
    except Exception:
        # It wraps itself, or has an attribute for every name.
        return function


def report_hard_timeout(job: Any, seconds: float) -> None:
    """Tell Celery that the hard limit of `job`, a `jobs.PoolJob`, was over after `seconds`.

    Prefork calls both callbacks, which on Celery 5.7 runs the errbacks, `on_failure` and the
    `task_failure` signal twice (seen). Here everything happens once: since 5.7 `on_timeout` does
    it all; before, it neither rejects the message nor sends the event and the signal, but
    `on_failure` does, and lacks the words for the log. Others than Celery's `Request` are told as
    by prefork.
    """
    if _request_of(job.callbacks.error_callback) is None:
        job.callbacks.error_callback(exception_info(TimeLimitExceeded(seconds)))
        job.callbacks.timeout_callback(soft=False, timeout=seconds)
        return
    if celery.VERSION >= (5, 7):
        job.callbacks.timeout_callback(soft=False, timeout=seconds)
        return
    logger.error("Hard time limit (%ss) exceeded for %s[%s]", seconds, job.task_name, job.task_id)
    job.callbacks.error_callback(exception_info(TimeLimitExceeded(seconds)))


def resolve_auto_concurrency(worker: Any) -> None:
    """Let `worker`, whose pool is ours, have as many children with ``-c auto`` as it may use CPUs.

    Celery 5.7 brought ``auto``. It respects a container's quota for subclasses of prefork's pool,
    and takes all other pools for such as need no CPU. Call it from the signal `worker_init`:
    right after that, Celery looks for itself.
    """
    if celery.VERSION >= (5, 7):
        from celery.utils.sysinfo import cpu_budget, is_auto_concurrency

        if is_auto_concurrency(worker.concurrency):
            worker.concurrency = cpu_budget().count


def ignores_result(task: Task, request: Mapping[str, Any]) -> bool:
    """Return whether nothing is to be stored of a request of `task`, of which `request` has the
    fields.

    Since Celery 5.7 the request's own word wins (celery/app/task.py: `get_actual_ignore_result`);
    before, either's is enough.
    """
    if isinstance(task.backend, DisabledBackend):
        return True
    asked = request.get("ignore_result")
    if celery.VERSION >= (5, 7) and asked is not None:
        return bool(asked)
    return bool(task.ignore_result or asked)


def is_observed() -> bool:
    """Return whether anybody listens to what Celery's tracer signals of each task."""
    return bool(
        signals.task_prerun.receivers
        or signals.task_postrun.receivers
        or signals.task_success.receivers
    )


#: What Celery's tracer calls the task's own code by: its body, and its hook before it, whose
#: exceptions are the body's (5.3 to 5.7: celery/app/trace.py, `build_tracer`).
_BODY = frozenset(("fun", "task_before_start"))


def is_trace(code: CodeType) -> bool:
    """Return whether `code` is that of the function which traces a job."""
    # Not the file of `build_tracer`, in whose place agents put functions of their own.
    return "fun" in code.co_freevars and code.co_filename == trace.__file__


def is_at_body(tracer: FrameType) -> bool:
    """Return whether the frame of a tracer is where it calls the task's own code."""
    return tracer.f_lineno in _lines_of_body(tracer.f_code)


@cache
def _lines_of_body(tracer: CodeType) -> frozenset[int]:
    found = set()
    starts = dict(dis.findlinestarts(tracer))
    line = None
    for instruction in dis.get_instructions(tracer):
        line = starts.get(instruction.offset, line)
        if instruction.argval in _BODY and line is not None:
            found.add(line)
    return frozenset(found)


def live_receivers(signal: Any, sender: Any) -> list[Any]:
    """Return who is called when `sender` sends `signal`.

    Celery 5.3 to 5.7 have no public name for it (celery/utils/dispatch/signal.py).
    """
    found: list[Any] = signal._live_receivers(sender)
    return found


#: What a tracer calls of a task's class, in Celery 5.3 to 5.7 (celery/app/trace.py:
#: `build_tracer`). Of later ones nothing is known.
_CALLED_OF_TASKS = ("__call__", "before_start", "on_success", "after_return")

#: The modules whose functions let nobody see a trace. A running worker has replaced
#: `Task.__call__` by one of the second (`setup_worker_optimizations`).
_SILENT_MODULES = {
    "celery.app.task",
    "celery.app.trace",
    "celery.backends.base",
    "celery.loaders.base",
    f"{__package__}.tasks",
}


def may_be_observed(app: Celery, task: Task) -> bool:
    """Return whether something but Celery's own code and ours is called when `task` is traced and
    succeeds, whose result is ignored.

    Packages that watch tasks wrap what a tracer calls, the tracer, or what makes it (Sentry: all of
    it; New Relic: the last).
    """
    loader, backend = type(app.loader), type(task.backend)
    called = [vars(kind).get(name) for kind in type(task).__mro__ for name in _CALLED_OF_TASKS]
    called += [trace.build_tracer, task.__trace__, loader.on_task_init, loader.on_process_cleanup]
    called += [backend.process_cleanup, backend.mark_as_done]
    return (
        celery.VERSION >= (5, 8)
        or not all(function is None or _is_silent(function) for function in called)
        or bool(app.conf.worker_deduplicate_successful_tasks)
    )


def _is_silent(function: object) -> bool:
    """Return whether `function` is Celery's or ours, and not wrapped.

    The globals tell: `functools.wraps` and wrapt's objects pass on the name of the module, and the
    latter even the type, for `isinstance`.
    """
    if type(function) is not FunctionType:
        return False
    return function.__globals__.get("__name__") in _SILENT_MODULES


def deserialized_body(callback: Callable[..., Any]) -> Any:
    """Return the body of a message as Celery has deserialized it when it came; None if it is not
    known, or somebody may have changed it since: the tracer would read the message anew.

    Arguments:
        callback: one of those that `apply_async` was given: a method of Celery's `Request` (5.3 to
            5.7), which has looked at the arguments.
    """
    request = _request_of(callback)
    if request is None or signals.task_received.receivers:
        return None
    return request.message.payload


def _request_of(callback: Callable[..., Any]) -> Any:
    """Return the `celery.worker.request.Request` that `callback` is a method of, or None."""
    request = getattr(callback, "__self__", None)
    return request if isinstance(request, Request) else None


def is_cancelled(job: Any) -> bool:
    """Return whether Celery ends `job`, a `jobs.PoolJob`, because the worker stops or has lost its
    broker, and not because somebody has revoked it.

    A cold shutdown cancels its jobs before it says so anywhere (5.3 to 5.7: `Request.cancel`).
    """
    request = _request_of(job.callbacks.error_callback)
    return request is not None and request._already_cancelled


def is_unacknowledged(job: Any) -> bool:
    """Return whether the broker still has the message of `job`, a `jobs.PoolJob`, which it delivers
    again when the worker is gone (5.3 to 5.7: `Request.acknowledged`)."""
    request = _request_of(job.callbacks.error_callback)
    return request is not None and not request.acknowledged


def reject(job: Any) -> None:
    """Reject the message of `job`, a `jobs.PoolJob`: the broker drops it or puts it aside, and
    does not deliver it again.

    Celery has no callback for it, but its callbacks are methods of the `Request` that has one
    (5.3 to 5.7: celery/worker/request.py). Of a message that was acknowledged early, nothing is
    left to reject.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None:
        request.reject(requeue=False)


def acknowledge_early(job: Any) -> None:
    """Acknowledge the message of `job`, a `jobs.PoolJob`, if that is not to wait for its end (as
    `Request.on_accepted` does, 5.3 to 5.7)."""
    request = _request_of(job.callbacks.error_callback)
    if request is not None and not request.task.acks_late:
        request.acknowledge()


def store_revoked_again(job: Any) -> None:
    """Store that `job`, a `jobs.PoolJob`, is REVOKED, if it is, once more.

    Celery stores it before it tells the pool (5.3 to 5.7: `Request.terminate`), when the tracing
    thread may be about to store an earlier state, and a Python child its own end of the job. Only
    the state is stored again: the rest of `mark_as_revoked`, such as telling a chord, has been
    done.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None and request._already_revoked and request.store_errors:
        request.task.backend.store_result(
            job.task_id, TaskRevokedError("terminated"), REVOKED, request=request._context
        )


def run_queued_acks(hub: Any) -> None:
    """Send the acknowledgements that wait for the hub's next turn.

    While the pool drains, nobody turns the hub, and an ack that is never sent makes the broker
    deliver a finished task again. Only acks and rejects are run: the transport's own reader may
    wait there too, and would deliver messages to a pool that takes no more.

    kombu 5.3 to 5.7 keep what `call_soon` was given in a set that `_pop_ready` empties; Celery's
    consumer queues the bound methods `ack_log_error` and `reject_log_error` of a message.
    """
    for callback in hub._pop_ready():
        function = getattr(callback, "fun", None)
        if isinstance(getattr(function, "__self__", None), Message):
            try:
                callback()
            except Exception:
                # kombu logs connections that are lost, but has other errors for some.
                logger.exception(
                    "An acknowledgement can't be sent: its job will be delivered again"
                )
        else:
            hub.call_soon(callback)


def app_argument(parameter: object, argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Return what the option ``-A`` of the `celery` command was given; None if it was not.

    Arguments:
        parameter: the option's value in click's context. Older versions (5.3) have put the app
            that they found there in the name's place.
        argv: the command line, for them.
        environ: the environment, which may have it instead.
    """
    if isinstance(parameter, str):
        return parameter
    for word, following in zip(argv, (*argv[1:], ""), strict=True):
        if word in ("-A", "--app"):
            return following
        if word.startswith("--app="):
            return word.removeprefix("--app=")
        if word.startswith("-A"):
            return word[2:]
    return environ.get("CELERY_APP")


@contextmanager
def as_current(task: Task, context: Context) -> Iterator[None]:
    """Within this context, `task` with the request `context` is the current one, as for Celery's
    `TaskFormatter` of log records. Celery's tracer does it so (5.3 to 5.7)."""
    _state._task_stack.push(task)
    task.request_stack.push(context)
    try:
        yield
    finally:
        task.request_stack.pop()
        _state._task_stack.pop()


def block_joins() -> None:
    """Let `result.get()` inside of a task raise: it would wait for a slot that it holds.

    Celery has no public name for it; this is what `concurrency.prefork.process_initializer` calls.
    """
    _state._set_task_join_will_block(True)


def install_fixups(app: Celery) -> None:
    """Connect what Celery's Django fixup does around each task and at a process' start.

    In a worker, the signal `worker_init` does so, and forked processes inherit it. It is not sent
    here: users connect to it what is to happen once for a worker. Celery 5.3 to 5.7 keep fixups in
    `_fixups`, and the part that is for workers in `worker_fixup`.
    """
    for fixup in app._fixups or ():
        worker_fixup = getattr(fixup, "worker_fixup", None)
        if worker_fixup is not None:
            worker_fixup.install()
