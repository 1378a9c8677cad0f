"""Jobs that are no tasks: any callable that a package gives to the pool, as `BasePool` promises.

Layer: above `jobs` and `messages`. A Python child calls it: pickled, from the worker to the child
only. `compat.is_tracer` says what is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.utils.functional import noop
from celery.utils.log import get_logger
from kombu.utils.uuid import uuid

from ..errors import CallError
from ..python_child.calls import encode_call, name_of
from ..settings import PYTHON, ROOT
from .jobs import Callbacks, Owner, PoolJob

__all__ = ("CallJob",)

logger = get_logger(__name__)


class CallJob(PoolJob):
    """The job of having a Python child call something.

    It has an id of its own: callers need not have one, and may use theirs twice. If its caller has
    no `error_callback`, the log is told of its failure.

    Arguments:
        owner: takes its wishes to the engine.
        target: the callable.
        asked: whom to tell of it, as `Callbacks`; None is nobody, as on prefork.
    """

    __slots__ = ()

    def __init__(
        self,
        owner: Owner,
        target: Callable[..., Any],
        asked: Sequence[Callable[..., None] | None],
    ) -> None:
        name, own_id = name_of(target), uuid()
        callbacks = Callbacks._make(callback or noop for callback in asked)
        if callbacks.error_callback is noop:
            callbacks = callbacks._replace(error_callback=partial(_log, f"{name}[{own_id}]"))
        super().__init__(owner, target, (name, own_id, {}), callbacks)
        self.group, self.traced_here = PYTHON, False

    def prepare(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], has_python_children: bool
    ) -> None:
        """Find out its request.

        Arguments:
            args: the positional arguments.
            kwargs: the keyword arguments.
            has_python_children: whether this worker has a group of such.

        Raises:
            CallError: it can't be done; the message says why, and what to do.
        """
        if not has_python_children:
            raise CallError(
                f"{self.task_name} is no task but a callable, for which this worker has no Python"
                f" children, since its external ones take all tasks. Name in {ROOT}.children.<name>"
                ".tasks what each group is to take, and leave the task in question out"
            )
        self.request = encode_call(self.task_id, self._target, args, kwargs)


def _log(title: str, einfo: ExceptionInfo) -> None:
    logger.error("%s failed, and nobody else is told of it:\n%s", title, einfo.traceback)
