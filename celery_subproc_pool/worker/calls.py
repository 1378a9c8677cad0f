"""Jobs that are not tasks: `BasePool.apply_async` takes any callable, and some packages use that.

A Python child calls it. Only the worker pickles, and only the child unpickles. `requests.is_tracer`
tells tasks from callables.
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
    """A job for which a Python child calls something.

    It gets an id of its own: callers may have none, or use one twice. If its caller gives no
    `error_callback`, the log gets its failure.

    Arguments:
        owner: passes on to the engine what the job asks for.
        target: the callable.
        callbacks: as `Callbacks`; each may be None, as on prefork.
    """

    __slots__ = ("_target",)

    def __init__(
        self,
        owner: Owner,
        target: Callable[..., Any],
        callbacks: Sequence[Callable[..., None] | None],
    ) -> None:
        name, own_id = name_of(target), uuid()
        told = Callbacks._make(callback or noop for callback in callbacks)
        if told.error_callback is noop:
            told = told._replace(error_callback=partial(_log, f"{name}[{own_id}]"))
        super().__init__(owner, (name, own_id, {}), told)
        self.group = PYTHON
        self._target = target

    def prepare(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], has_python_children: bool
    ) -> None:
        """Make the request.

        Arguments:
            args: the positional arguments.
            kwargs: the keyword arguments.
            has_python_children: whether this worker has Python children.

        Raises:
            CallError: no child can do it; the message says why, and what to do.
        """
        if not has_python_children:
            raise CallError(
                f"{self.task_name} is a callable and not a task: only Python children can call it."
                " This worker has none, because its external children take all tasks. List the"
                f" tasks of each group in {ROOT}.children.<name>.tasks, and leave one out: then"
                " the worker has Python children"
            )
        self.request = encode_call(self.task_id, self._target, args, kwargs)


def _log(title: str, einfo: ExceptionInfo) -> None:
    logger.error("%s failed, and its caller gave no error_callback:\n%s", title, einfo.traceback)
