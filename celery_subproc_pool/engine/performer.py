"""Performs the scheduler's actions, with one method for each.

Two kinds differ in time. What concerns processes and the log is done at once. What concerns the
owner of the jobs becomes a callback, and callbacks run after all actions of a turn. So the request
of a job is written before Celery is told that the job is accepted: the child works meanwhile.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from ..core import actions, outcomes
from ..core.actions import Change
from ..core.model import Child, JobState
from ..core.outcomes import ChildFacts, Outcome
from ..core.scheduler import Scheduler
from ..errors import SpawnError
from ..wire.messages import Reply, encode_cancel
from ..wire.python import encode_abandon
from . import programs, reports
from .descriptors import Descriptors
from .loop import Loop
from .processes import Processes
from .running import RunningChild

__all__ = ("Listener", "Performer")


class Listener(Protocol):
    """The owner of the jobs. Called on the thread that turns the engine."""

    def accepted(self, job: Any, child: Child, now: float) -> None:
        """`job` was handed to `child` at monotonic time `now`."""

    def resolved(
        self, job: Any, outcome: Outcome, facts: ChildFacts | None, unfinished: bool
    ) -> None:
        """The time of `job` with a child is over; `unfinished` if the end of its trace follows."""

    def finished(self, job: Any, reply: Reply | None) -> None:
        """The trace of `job` is over, with `reply` if it came to its end. The job may have been
        resolved before."""

    def soft_timed_out(self, job: Any, told: bool) -> None:
        """The soft time limit of `job` is over. `told` says whether its child was told."""

    def overruled(self, job: Any) -> None:
        """The child of `job`, which had been resolved as terminated, has ended it now."""

    def progressed(self, job: Any, meta: dict[str, Any]) -> None:
        """The child of `job` has sent progress."""

    def child_changed(self, change: Change) -> None:
        """A child has come into service, or was replaced."""

    def failed(self, error: Exception) -> None:
        """The engine has failed with `error`, and does nothing any more. Called once."""


class Performer:
    """Performs actions. `handlers` has the method for each type of action.

    Arguments:
        loop: calls back, and tells the scheduler what follows from an action.
        scheduler: is told.
        listener: is called back.
        processes: are started, signalled and forgotten.
        descriptors: write to children.
    """

    def __init__(
        self,
        loop: Loop,
        scheduler: Scheduler,
        listener: Listener,
        processes: Processes,
        descriptors: Descriptors,
    ) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._listener = listener
        self._processes = processes
        self._descriptors = descriptors
        #: Whether the pool starts: then a child that can't be spawned is an error.
        self.starting = False
        #: By the groups' names: the last lines of stderr of the last child that did not come up.
        self.last_words: dict[str, tuple[str, ...]] = {}
        self.handlers: Mapping[type, Callable[[Any], None]] = {
            **self._handlers_at_once(),
            **self._handlers_that_call_back(),
        }

    def _handlers_at_once(self) -> dict[type, Callable[[Any], None]]:
        return {
            actions.Spawn: self._spawn,
            actions.Write: self._write,
            actions.Cancel: self._cancel,
            actions.Tell: self._tell,
            actions.Abandon: self._abandon,
            actions.Interrupt: self._interrupt,
            actions.Kill: self._kill,
            actions.CloseStdin: self._close_stdin,
            actions.Probe: self._probe,
            actions.Measure: self._measure,
            actions.Forget: self._forget,
            actions.Logged: self._logged,
            actions.Unkillable: reports.unkillable,
            actions.Stranded: reports.stranded,
            actions.StandsStill: self._stands_still,
            actions.GoesOn: reports.goes_on,
            actions.Healed: lambda action: reports.healed(action.group),
        }

    def _handlers_that_call_back(self) -> dict[type, Callable[[Any], None]]:
        return {
            actions.Accept: self._accept,
            actions.Resolve: self._resolve,
            actions.Finished: self._finished,
            actions.SoftTimeout: self._soft_timeout,
            actions.Overruled: self._overruled,
            actions.Progressed: self._progressed,
            actions.Started: self._child_changed,
            actions.Report: self._report,
            actions.Recycled: self._recycled,
        }

    # -- at once

    def _spawn(self, action: actions.Spawn) -> None:
        child = action.child
        try:
            self._processes.spawn(child)
        except (SpawnError, OSError) as exc:
            if self.starting and isinstance(exc, SpawnError):
                raise
            self._loop.tell(self._scheduler.spawn_failed, child, str(exc))

    def _write(self, action: actions.Write) -> None:
        child, job = action.child, action.job
        running = self._processes.get(child)
        if running is None or not self._descriptors.hear_first(running):
            return
        if job.request is None or job.child is not child or job.state is not JobState.RESERVED:
            # What the child wrote has just cost it this job.
            return
        process = running.process
        offset = process.written
        if child.capacity > 1 and process.stdin is not None:
            # More may follow in this turn, and one system call writes all.
            self._descriptors.put_off(running, job.request)
            self._loop.note(self._scheduler.written, child, job, offset)
            return
        try:
            put = self._descriptors.write(running, job.request)
        finally:
            # Also if the rest of it can't be watched: once a byte is written, the job is sent.
            if process.written > offset:
                self._loop.note(self._scheduler.written, child, job, offset)
        if not put:
            self._descriptors.give_up_writing(running)

    def _cancel(self, action: actions.Cancel) -> None:
        running = self._processes.get(action.child)
        if running is not None:
            # If it can't be written, the child's exit tells why.
            self._descriptors.write(running, encode_cancel(action.job.task_id, action.reason))

    def _tell(self, action: actions.Tell) -> None:
        running = self._processes.get(action.child)
        if running is not None:
            self._descriptors.put_off(running, action.line)

    def _abandon(self, action: actions.Abandon) -> None:
        line = encode_abandon(action.job.task_id, action.revoked)
        self._tell(actions.Tell(action.child, line))

    def _interrupt(self, action: actions.Interrupt) -> None:
        running = self._processes.get(action.child)
        if running is not None and not running.signal(action.signum):
            # Its pid is unknown. The wrapper that was started may pass the signal on.
            running.kill(action.signum)

    def _kill(self, action: actions.Kill) -> None:
        running = self._processes.get(action.child)
        if running is None:
            return
        if action.signum == signal.SIGKILL:
            running.programs = _programs_of(running)
        if not running.kill(action.signum) and action.signum == signal.SIGKILL:
            reason = reports.why_not_ours(running.process.pid)
            self._loop.tell(self._scheduler.unkillable, action.child, reason)

    def _close_stdin(self, action: actions.CloseStdin) -> None:
        running = self._processes.get(action.child)
        if running is not None:
            self._descriptors.stop_writing(running)
            running.process.close_stdin()

    def _probe(self, action: actions.Probe) -> None:
        running = self._processes.get(action.child)
        if running is not None:
            read = running.process.read_bytes()
            self._loop.tell(self._scheduler.probed, action.child, read)

    def _measure(self, action: actions.Measure) -> None:
        memory = self._processes.memory_of(action.child)
        self._loop.note(self._scheduler.measured, action.child, memory)

    def _forget(self, action: actions.Forget) -> None:
        self._processes.forget(action.child, action.leaves, self._scheduler.stopping)

    def _logged(self, action: actions.Logged) -> None:
        running = self._processes.get(action.child)
        if running is not None:
            running.log(action.record, action.job)

    def _stands_still(self, action: actions.StandsStill) -> None:
        reports.stands_still(action)
        running = self._processes.get(action.child)
        if running is not None:
            # It writes to its stderr which code it runs.
            running.signal(signal.SIGUSR1)

    # -- by a callback

    def _accept(self, action: actions.Accept) -> None:
        accepted = partial(self._listener.accepted, action.job, action.child, action.now)
        self._loop.call_later(accepted)

    def _resolve(self, action: actions.Resolve) -> None:
        facts = None
        if action.child is not None and not isinstance(action.outcome, outcomes.Answered):
            running = self._processes.get(action.child)
            facts = None if running is None else running.facts()
        resolved = partial(
            self._listener.resolved, action.job, action.outcome, facts, action.unfinished
        )
        self._loop.call_later(resolved)

    def _finished(self, action: actions.Finished) -> None:
        self._loop.call_later(partial(self._listener.finished, action.job, action.reply))

    def _soft_timeout(self, action: actions.SoftTimeout) -> None:
        running = self._processes.get(action.child)
        # A child that can cancel is told by a `Cancel` of its own.
        told = action.child.cancels
        if action.signum is not None and running is not None:
            told = running.signal(action.signum)
        self._loop.call_later(partial(self._listener.soft_timed_out, action.job, told))

    def _overruled(self, action: actions.Overruled) -> None:
        self._loop.call_later(partial(self._listener.overruled, action.job))

    def _progressed(self, action: actions.Progressed) -> None:
        self._loop.call_later(partial(self._listener.progressed, action.job, action.meta))

    def _report(self, action: actions.Report) -> None:
        child = action.child
        running = self._processes.get(child)
        facts: ChildFacts | None = None
        rest: tuple[str, ...] = ()
        if running is not None:
            facts = running.facts()
            rest = _programs_of(running) if running.programs is None else running.programs
            if not child.proven:
                self.last_words[child.group.name] = facts.stderr
        reports.replaced(action, facts, rest)
        self._child_changed(action)

    def _recycled(self, action: actions.Recycled) -> None:
        reports.recycled(action)
        self._child_changed(action)

    def _child_changed(self, change: Change) -> None:
        self._loop.call_later(partial(self._listener.child_changed, change))


def _programs_of(running: RunningChild) -> tuple[str, ...]:
    """Return the programs that run in the child's process group beside the child, as text."""
    [rest] = programs.members([running.process.pid]).values()
    return programs.titles(pid for pid in rest if pid != running.pid)
