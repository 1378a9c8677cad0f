"""The engine: it owns all children, and performs on them what the scheduler decides.

It is put together from parts that each own one thing:

- `loop`: the turn, the inbox, and the order in which things happen;
- `descriptors`: pipes and exits, and the events that come from them;
- `processes`: children and the guardian, from their start to their end;
- `performer`: one method for each action.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..core import model
from ..core.actions import Action
from ..core.model import Child
from ..core.scheduler import Scheduler
from ..errors import SpawnError
from ..wire.messages import CancelReason
from .descriptors import Descriptors
from .forks import keep_from_copies
from .loop import Loop
from .performer import Listener, Performer
from .processes import Processes

__all__ = ("Listener", "Supervisor")


class Supervisor(Loop):
    """The engine. Its owner turns it, posts events to it, and is told by it: it is a `Loop`.

    Arguments:
        scheduler: decides.
        listener: is told about jobs.
        environ: the environment that children start from.
        clock: monotonic time in seconds; `time.monotonic`, because Celery's is.
        owner: the worker's node name, shown in the guardian's command line.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        listener: Listener,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        owner: str = "",
    ) -> None:
        # Filled below: what performs actions needs this loop.
        perform: dict[type, Callable[[Any], None]] = {}
        super().__init__(scheduler, perform, listener.failed, clock)
        self.scheduler = scheduler
        self._descriptors = Descriptors(self, scheduler)
        self._processes = Processes(self, scheduler, self._descriptors, environ, owner)
        self._performer = Performer(self, scheduler, listener, self._processes, self._descriptors)
        perform.update(self._performer.handlers)
        keep_from_copies(self)

    # -- starting and ending

    def start(self) -> None:
        """Spawn all children.

        Raises:
            SpawnError: one can't be started. Those that were started are gone again.
        """
        self._processes.start_guardian()
        self._performer.starting = True
        try:
            self.begin(self.scheduler.start)
        except SpawnError:
            self.kill_all()
            raise
        finally:
            self._performer.starting = False

    def kill_all(self) -> None:
        """Kill every child and forget it, whatever state it is in. No callback is made.

        Safe in a signal handler.
        """
        self.scheduler.abandon()
        self._processes.kill_all()

    def close(self) -> None:
        """Kill all children that are left, and give back all resources."""
        self.kill_all()
        super().close()

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's descriptors, and touch no child."""
        if not self._closed:
            self._processes.disown()
            super().disown()

    # -- jobs

    def terminate(self, job: model.Job, signum: int, reason: CancelReason) -> None:
        """End `job`, from any thread, unless its child has replied: a reply that came in time is
        not late because it has not been read yet."""
        self.post(self._terminate, job, signum, reason)

    def _terminate(
        self, job: model.Job, signum: int, reason: CancelReason, now: float
    ) -> list[Action]:
        running = None if job.child is None else self._processes.get(job.child)
        if running is not None:
            self._descriptors.hear_now(running)
        return self.scheduler.terminate(job, signum, now, reason)

    # -- facts

    @property
    def processes(self) -> list[int]:
        """The pids of all children."""
        return [running.process.pid for running in self._processes]

    @property
    def writing(self) -> int:
        """The number of children whose pipe has not taken all of a request yet."""
        return sum(running.writing for running in self._processes)

    @property
    def awaited(self) -> bool:
        """Whether there is a child that will exit. One that can't be killed may not."""
        return any(not running.child.unkillable for running in self._processes)

    def memory_of(self, child: Child) -> int:
        """Return the resident memory of `child` and of what it has started, in bytes; 0 if it is
        gone."""
        return self._processes.memory_of(child)

    def template_of(self, group: str) -> dict[str, Any] | None:
        """Return facts of the template of `group`: its ``pid``, whether it is ``ready``, how many
        ``children`` it has, how many ``forks`` it has done, and the mean seconds of a ``fork``.
        None if there is none."""
        return self._processes.template_of(group)

    def last_words(self, group: str) -> tuple[str, ...]:
        """Return the last lines of stderr of the last child of `group` that did not come up."""
        return self._performer.last_words.get(group, ())
