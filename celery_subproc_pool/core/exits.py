"""How a child leaves: it can't start, closes a stream, exits, or can't be killed."""

from __future__ import annotations

import signal

from . import service, slots
from .actions import Action, CloseStdin, Forget, Unkillable
from .jobs import Jobs
from .model import Cause, Child, ChildState, Job, JobState
from .outcomes import Lost, describe_exit
from .replacing import Replacing, cause_of_exit
from .spawning import Spawning
from .stopping import Stopping
from .traces import Traces

__all__ = ("HELD", "Exits")

#: Why a child lives on after SIGKILL.
HELD = "it has not exited since it got SIGKILL, so the system holds on to it (a disk that hangs?)"


class Exits:
    """Takes the ends of children."""

    def __init__(
        self,
        jobs: Jobs,
        spawning: Spawning,
        stopping: Stopping,
        replacing: Replacing,
        traces: Traces,
    ) -> None:
        self._jobs = jobs
        self._traces = traces
        self._spawning = spawning
        self._stopping = stopping
        self._replacing = replacing

    # -- it can't start

    def spawn_failed(self, child: Child, reason: str, details: str, now: float) -> list[Action]:
        """The process of `child` could not be started."""
        slots.forget(child)
        if child.state is ChildState.STOPPING:
            # It was not needed any more.
            child.move(ChildState.GONE)
            return []
        cause = Cause.NOT_STARTED
        actions = self._replacing.replace(child, cause, reason, now, ChildState.GONE)
        self._spawning.note_failure(child.group, details or reason)
        return actions

    def boot_failed(self, child: Child, message: str, now: float) -> list[Action]:
        """`child` said that it can't boot."""
        if child.state is ChildState.STOPPING:
            return []
        summary, _, _ = message.partition("\n")
        reason = f"it can't boot: {summary}"
        actions = self._replacing.kill_and_replace(child, Cause.NOT_STARTED, reason, now)
        self._spawning.note_failure(child.group, message)
        return actions

    # -- it closes a stream

    def unwritten(self, child: Child, reason: str, read: int, now: float) -> list[Action]:
        """`child` takes no more requests, and has read `read` bytes."""
        if child.state is not ChildState.BUSY:
            return self._replacing.expect_exit(child, reason, now)
        self._jobs.take_back_unread(child, read)
        sent = [job for job in child.jobs.values() if job.state is not JobState.RESERVED]
        if not sent:
            return self._replacing.expect_exit(child, reason, now)
        # It may answer what it has read, within the limits of its jobs.
        actions = self._replacing.replace(child, Cause.EXITED, reason, now, ChildState.BUSY)
        self._traces.unwritten(child)
        traces = any(job.traces is not None for job in sent)
        if traces or not any(_can_be_done(job, read) for job in sent):
            # It can only exit. A tracer that also has a task of Celery's own would never do so.
            stop_timeout = child.group.settings.stop_timeout
            self._stopping.escalate_at(child, now + stop_timeout, terminating=False)
        return actions

    def stdout_closed(self, child: Child, now: float) -> list[Action]:
        """`child` closed its stdout: it exits, or can't be used any more."""
        return self._replacing.expect_exit(child, "it closed its stdout", now)

    # -- it is gone, or should be

    def exited(self, child: Child, status: int, read: int, now: float) -> list[Action]:
        """The process of `child` ended with `status`, and had read `read` bytes."""
        self._jobs.take_back_unread(child, read)
        seen_before = child.reason
        killed_by_others = status == -signal.SIGKILL and not child.killed
        reason = f"it exited: {describe_exit(status, killed_by_others)}"
        if child.state is ChildState.STOPPING or child.draining:
            actions = self._exited_as_expected(child, reason)
        else:
            cause = cause_of_exit(child)
            actions = self._replacing.replace(child, cause, reason, now, ChildState.GONE)
        lost = Lost(status, seen_before, killed_by_others)
        ends = self._jobs.lose(child, lost, count_crash=not self._spawning.stopped)
        service.clear(child)
        slots.forget(child)
        # Now, because nothing is known of the child once it is forgotten; and last, because traces
        # end after their jobs, some of which the replacement has given up.
        settled = self._traces.settle(now)
        return [*ends, *actions, *settled, Forget(child, self._leaves(child))]

    def _exited_as_expected(self, child: Child, reason: str) -> list[Action]:
        """`child` was replaced, or told to stop, before it exited."""
        child.move(ChildState.GONE)
        if not child.proven and not child.killed:
            why = f"{child.reason}; {reason}" if child.reason else reason
            self._spawning.note_failure(child.group, why)
        return [] if self._spawning.stopped else self._jobs.take_back(child)

    def _leaves(self, child: Child) -> bool:
        """Return whether what `child` has started goes on: as `leftovers` says, if the child ended
        in order. Nothing goes on after the worker."""
        keeps = child.group.settings.leftovers == "keep"
        return keeps and child.in_order and not self._spawning.stopped

    def unkillable(self, child: Child, reason: str) -> list[Action]:
        """`child` lives on after it was to be killed: wait no more for its exit."""
        if child.unkillable:
            return []
        self._stopping.give_up(child)
        # The end of its stdin is the last that it can be told.
        actions: list[Action] = [
            Unkillable(child, reason, tuple(child.jobs.values())),
            CloseStdin(child),
        ]
        lost = Lost(None, f"its child can't be killed: {reason}")
        for job in child.jobs.values():
            if job.state in (JobState.RESERVED, JobState.SENT):
                actions += self._jobs.resolve(job, lost)
        service.clear(child)
        return actions

    def tick(self, child: Child, now: float) -> list[Action]:
        """End a child that is not ready in time; give up one that has not exited after SIGKILL."""
        if self._stopping.is_overdue(child, now):
            return self.unkillable(child, HELD)
        if child.boot_deadline is not None and now >= child.boot_deadline:
            why = child.reason or _why_not_ready(child)
            return self._replacing.kill_and_replace(child, Cause.NOT_STARTED, why, now)
        return []


def _can_be_done(job: Job, read: int) -> bool:
    """Return whether a child that has read `read` bytes, and reads no more, can do `job`, which is
    no trace: of a trace, it would have to be told how it goes on."""
    return job.offset + len(job.request or b"") <= read


def _why_not_ready(child: Child) -> str:
    seconds = child.group.settings.start_timeout
    instead = (
        child.unfinished
        or child.bad_greeting
        or 'it did not write {"status":"ready","protocol":1}, as its group\'s handshake asks it to'
    )
    return f"it was not ready within {seconds:g} s (start_timeout): {instead}"
