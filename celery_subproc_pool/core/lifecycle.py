"""Decides what becomes of children, whatever their jobs: spawn, settle, recycle, stop, back off.

Layer: above `limits`, `records` and `errors`. Must not import a clock, processes or Celery.
`scheduler`, which has the jobs, is above it, and takes care of a child's job before it gives the
child up.

A slot of a group has one child that serves it. When that one is worn (it has done enough jobs, is
old, big, or asked for it), a successor boots beside it, and takes its place once it has proved
that it works::

                 +-- not ready, exited, fault: the slot cools, then spawns again
                 |
    STARTING --ready--> IDLE <--> BUSY --did max_jobs--> RETIRING
                         |         |                        |
                         +---------+---- its successor -----+----> STOPPING --exit--> GONE

A child is BUSY while it has a job in hand, also if it could have more: most have one at a time, and
those that said so in their handshake up to their `capacity`.

A busy child whose successor serves already goes on until its jobs have ended, and so does one that
takes no more requests, but still answers those that it has: it drains. A worn child goes on serving
until its successor is ready, but one that did `max_jobs` jobs: that is a promise.

A child with a handshake has proved itself when it is ready; any other when it has lived for
`STARTUP_GRACE` seconds, or replied.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator

from ..errors import TransitionError
from ..wire.messages import Feature, Ready
from .actions import Action, CloseStdin, Healed, Kill, Measure, Recycled, Report, Spawn, Started
from .limits import Alarm
from .model import TRANSITIONS, Cause, Child, ChildState, Exit, Group, Job, Slot

__all__ = ("Children",)

#: Seconds that a child without a handshake lives until it has proved that it can start.
STARTUP_GRACE = 0.5

#: Seconds from SIGKILL until a child has exited, unless the system holds on to it.
KILL_PATIENCE = 5.0

#: Seconds before a slot spawns again: doubled with every child that died before it did a job.
BACKOFF_FIRST, BACKOFF_LAST = 0.1, 30.0

#: The share of a group (but one child at least) whose successors may boot at a time.
RECYCLED_AT_A_TIME = 0.25

#: What a child can't help.
_WITHOUT_BACKOFF = (Cause.TIMED_OUT, Cause.TERMINATED)


class Children:
    """The children of all groups. Pure: see this module's docstring.

    Arguments:
        groups: the groups by name.
        alarm: is set to what is due next.
        random: returns numbers from 0 to 1, for jitter.
    """

    def __init__(self, groups: dict[str, Group], alarm: Alarm, random: Callable[[], float]) -> None:
        self.groups = groups
        self.stopping = False
        self._alarm = alarm
        self._random = random
        self._seen = 0
        #: Those that serve a slot and are to be recycled. An ordered set.
        self._worn: dict[Child, None] = {}

    def __iter__(self) -> Iterator[Child]:
        """Yield all that are not gone, while they may go."""
        for group in self.groups.values():
            yield from tuple(group.children.values())

    # -- starting

    def refill_all(self, now: float) -> list[Action]:
        """Spawn what slots lack, as far as they need not cool."""
        actions: list[Action] = []
        for group in self.groups.values():
            for slot in group.slots:
                if slot.child is None or slot.spawn_at is not None:
                    actions += self._refill(group, slot, now)
        return actions

    def spawned(self, child: Child, pid: int, now: float) -> list[Action]:
        """The process of `child` runs."""
        child.pid = pid
        if child.state is ChildState.STOPPING:
            return [CloseStdin(child)]
        if self.stopping:
            return self.stop_gently(child, now)
        child.spawned_at = now
        settings = child.group.settings
        if settings.handshake:
            child.deadline = now + settings.start_timeout
            self._alarm.set(child.deadline)
            return []
        child.startup_grace_until = now + STARTUP_GRACE
        self._alarm.set(child.startup_grace_until)
        if child.slot.child is child:
            self._take_into_service(child, now)
        return []

    def ready(self, child: Child, greeting: Ready, pid: int | None, now: float) -> list[Action]:
        """`child` has booted; `pid` is the process that does its work, None if it is unknown."""
        if child.state is ChildState.STOPPING:
            return []
        child.pid = pid or child.pid
        child.name = greeting.name
        child.tasks = frozenset(greeting.tasks or ())
        child.group.announces |= bool(child.tasks)
        child.features = greeting.known_features
        child.group.tells_progress |= Feature.PROGRESS in child.features
        child.unknown_features = greeting.unknown_features
        if Feature.MULTIPLEX in child.features:
            most = child.group.settings.max_in_flight
            child.capacity = min(most, greeting.max_in_flight or most)
        child.deadline = None
        child.has_read = True
        return self.prove(child, now)

    def prove(self, child: Child, now: float) -> list[Action]:
        """`child` works: let it take its place."""
        child.proven = True
        child.startup_grace_until = None
        group = child.group
        group.came_up = True
        group.failure = ""
        if child.state is ChildState.STARTING:
            self._take_into_service(child, now)
        actions: list[Action] = [Started(child)]
        if child.slot.successor is child:
            actions += self._take_over(child, now)
        if not group.degraded:
            return actions
        if group.settings.handshake:
            # It has said that it is ready. Whether it lives will be seen.
            child.startup_grace_until = now + STARTUP_GRACE
            self._alarm.set(child.startup_grace_until)
            return actions
        return [*actions, *self._heal(group)]

    @staticmethod
    def _heal(group: Group) -> list[Action]:
        """Let `group` be whole again, if each of its slots has a child that works."""
        if not group.degraded or not all(slot.child and slot.child.proven for slot in group.slots):
            return []
        group.degraded = False
        return [Healed(group)]

    def _take_into_service(self, child: Child, now: float) -> None:
        self.move(child, ChildState.IDLE)
        # Whoever has served before goes first: this one may still be booting.
        self._offer(child, last=False)
        max_age = child.group.settings.max_age
        if max_age is not None:
            child.max_age_at = now + max_age * child.recycle_factor
            self._alarm.set(child.max_age_at)

    def _refill(self, group: Group, slot: Slot, now: float) -> list[Action]:
        """Spawn what `slot` lacks: a child, or the successor of one that is worn."""
        if self.stopping:
            return []
        if slot.spawn_at is not None and now < slot.spawn_at:
            self._alarm.set(slot.spawn_at)
            return []
        slot.spawn_at = None
        if not self._lacks_child(slot):
            return []
        self._seen += 1
        child = Child(group, slot, self._seen)
        if group.settings.recycles:
            self._limit(child)
        if slot.child is None:
            slot.child = child
        else:
            slot.successor = child
            group.successors += 1
        group.children[child.number] = child
        return [Spawn(child)]

    def _limit(self, child: Child) -> None:
        settings = child.group.settings
        child.recycle_factor = 1.0 - settings.recycle_jitter * self._random()
        if settings.max_jobs is not None:
            child.recycle_after_jobs = max(1, math.ceil(settings.max_jobs * child.recycle_factor))

    @staticmethod
    def _lacks_child(slot: Slot) -> bool:
        child = slot.child
        if child is None:
            return True
        if not child.recycle_reason or slot.successor is not None:
            return False
        # While a successor boots, a child that does no more jobs is one too few anyway.
        most = max(1, int(len(child.group.slots) * RECYCLED_AT_A_TIME))
        return child.spent or child.group.successors < most

    # -- jobs

    @staticmethod
    def _offer(child: Child, last: bool) -> None:
        """Let `child` have another job: the next one, if it is the `last`."""
        available = child.group.available
        available[child] = None
        available.move_to_end(child, last)

    def reserve(self, child: Child, job: Job) -> None:
        """Let `child`, which is available, have `job`."""
        if child.state is ChildState.IDLE:
            self.move(child, ChildState.BUSY)
        child.jobs[job.task_id] = job
        job.child = child
        if child.has_room:
            # The next job is another child's, if there is one with fewer.
            self._offer(child, last=False)
        else:
            del child.group.available[child]

    @staticmethod
    def give_notice(child: Child) -> None:
        """`child` has to end one of its jobs."""
        child.pending_cancels += 1
        child.group.available.pop(child, None)

    def release(self, child: Child, job: Job, now: float) -> list[Action]:
        """Let a busy child, whose `job` is over, have another, or go if its time has come."""
        del child.jobs[job.task_id]
        child.ended.append(job.task_id)
        child.pending_cancels -= job.kill_at is not None
        serves = child.slot.child is child
        if not child.jobs:
            if not serves:
                return self.stop_gently(child, now)
            self.move(child, ChildState.RETIRING if child.spent else ChildState.IDLE)
        if serves and child.has_room:
            # Last in, first out: the warmest child serves next.
            self._offer(child, last=not child.jobs)
        return []

    # -- recycling

    def begins(self, child: Child) -> None:
        """`child` begins a job."""
        child.jobs_begun += 1
        if child.recycle_after_jobs is not None and child.jobs_begun >= child.recycle_after_jobs:
            # Already now: its successor can boot during its last job.
            self.wear_out(child, f"it has had {child.jobs_begun} jobs (max_jobs)")

    def replied(self, child: Child, retire: bool, now: float) -> list[Action]:
        """`child` has done a job; `retire` is whether it asks to be replaced."""
        child.jobs_done += 1
        child.group.jobs_done += 1
        child.has_read = True
        if child.state is ChildState.STOPPING or child.drains:
            # It is nobody's successor, and needs none any more.
            return []
        if not child.recycle_reason:
            # Otherwise they are those of its successors, until one takes its place.
            child.slot.failures = 0
        actions: list[Action] = [] if child.proven else self.prove(child, now)
        if retire:
            self.wear_out(child, "it asked for it (retire)")
        elif child.group.settings.max_memory is not None and not child.recycle_reason:
            actions.append(Measure(child))
        return actions

    def measured(self, child: Child, memory: int) -> None:
        """`child` and what it started take `memory` bytes."""
        most = child.group.settings.max_memory
        if most is not None and memory > most * child.recycle_factor:
            self.wear_out(child, f"it takes {memory / 2**20:.0f} MiB of memory (max_memory)")

    def wear_out(self, child: Child, reason: str) -> None:
        """Have `child` recycled: it serves on until another can take its place. One that is a
        successor yet takes its place first."""
        if not child.recycle_reason:
            child.recycle_reason = reason
            if child.slot.child is child:
                self._worn[child] = None

    def restart(self, group: Group, now: float) -> list[Action]:
        """Have all children of `group` recycled that run or boot, and let it cool no longer:
        what kept them from starting may have been mended."""
        for slot in group.slots:
            for child in (slot.child, slot.successor):
                if child is not None:
                    self.wear_out(child, "the pool is restarted")
        return self.try_anew(group, now)

    def try_anew(self, group: Group, now: float) -> list[Action]:
        """Let `group` cool no longer, and its failures be forgotten."""
        group.failure = ""
        for slot in group.slots:
            if slot.spawn_at is not None:
                slot.spawn_at = now
                slot.failures = 0
        return self.refill_all(now)

    @staticmethod
    def is_barren(group: Group) -> bool:
        """Whether no child of `group` serves, and since it was tried anew each slot has had one
        that failed. With no slots, there will be none."""
        return not group.in_service and (
            not group.slots or bool(group.failure and all(slot.failures for slot in group.slots))
        )

    def renew(self, now: float) -> list[Action]:
        """Spawn successors of children that are worn, as many as may boot at a time."""
        actions: list[Action] = []
        for child in tuple(self._worn):
            actions += self._refill(child.group, child.slot, now)
        return actions

    def _take_over(self, successor: Child, now: float) -> list[Action]:
        slot, group = successor.slot, successor.group
        old = slot.child
        assert old is not None
        self._promote(slot)
        if old.jobs_done:
            slot.failures = 0
        self._worn.pop(old, None)
        slot.last_exit = Exit(old.pid, old.recycle_reason, now)
        group.replaced[Cause.RECYCLED] += 1
        return [Recycled(old, successor), *self._retire(old, now)]

    def _promote(self, slot: Slot) -> None:
        """Let the successor in `slot`, if there is one, be its child."""
        slot.child, slot.successor = slot.successor, None
        if slot.child is not None:
            slot.child.group.successors -= 1
            if slot.child.recycle_reason:
                self._worn[slot.child] = None

    # -- giving up and stopping

    def vacate(
        self,
        child: Child,
        cause: Cause,
        reason: str,
        jobs: tuple[Job, ...],
        now: float,
        state: ChildState = ChildState.STOPPING,
    ) -> list[Action]:
        """Take `child` out of service, and let its slot spawn: later, if the child is to blame.

        Arguments:
            child: a child that is neither STOPPING nor GONE.
            cause: why, to be counted.
            reason: why, in words.
            jobs: what it had in hand.
            now: the time.
            state: GONE if its process is; BUSY if it is to end its jobs first.
        """
        child.reason = reason
        group, slot = child.group, child.slot
        if not child.proven:
            group.failure = reason
        if child.state is ChildState.STARTING:
            child.deadline = None
        self._withdraw(child, state)
        if not child.drains:
            # Otherwise it was counted before.
            group.replaced[cause] += 1
        child.drains = state is ChildState.BUSY
        slot.last_exit = Exit(child.pid, reason, now)
        served, awaited = slot.child is child, slot.successor is child
        if served:
            self._promote(slot)
        elif awaited:
            slot.successor = None
            group.successors -= 1
        actions: list[Action] = []
        delay = 0.0
        if served and slot.child is not None:
            self._hurry(slot.child, now)
        elif (served or awaited) and cause not in _WITHOUT_BACKOFF and child.jobs_done == 0:
            # One that has said that it is ready, too: it came to nothing.
            group.failure = reason
            delay = self._cool(group, slot, now)
        actions.append(Report(child, reason, jobs, delay))
        return [*actions, *(self._refill(group, slot, now) if served or awaited else ())]

    def _hurry(self, successor: Child, now: float) -> None:
        """Let a successor whose slot is empty now serve at once, if it can."""
        if successor.startup_grace_until is not None:
            self._take_into_service(successor, now)

    def _cool(self, group: Group, slot: Slot, now: float) -> float:
        """Put off the next spawn of `slot`; return for how long."""
        slot.failures += 1
        delay: float = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** min(slot.failures - 1, 20))
        delay *= 0.5 + self._random() / 2
        slot.spawn_at = now + delay
        group.degraded = True
        return delay

    def stop_gently(self, child: Child, now: float) -> list[Action]:
        """Close the stdin of `child`; it is killed if it does not exit."""
        if child.state is ChildState.STOPPING:
            return []
        self._withdraw(child, ChildState.STOPPING)
        self.escalate_at(child, now + child.group.settings.stop_timeout, terminating=False)
        return [CloseStdin(child)]

    def _withdraw(self, child: Child, state: ChildState) -> None:
        child.group.available.pop(child, None)
        child.startup_grace_until = child.max_age_at = None
        self._worn.pop(child, None)
        if state is not child.state:
            self.move(child, state)

    def escalate_at(self, child: Child, deadline: float, terminating: bool) -> None:
        """At `deadline`, kill `child`, with SIGTERM first unless it has been `terminating`."""
        child.deadline = deadline
        child.terminating = terminating
        self._alarm.set(deadline)

    def kill(self, child: Child, signum: int, now: float) -> Kill:
        """Return what kills `child`, and remember that it was us. What is due next, after SIGKILL,
        is the look whether it has exited: `is_overdue`."""
        if signum == signal.SIGKILL:
            child.killed = True
            self.escalate_at(child, now + KILL_PATIENCE, terminating=True)
        return Kill(child, signum)

    @staticmethod
    def is_overdue(child: Child, now: float) -> bool:
        """Whether `child` should have exited long ago, for it was killed."""
        return child.killed and child.deadline is not None and now >= child.deadline

    @staticmethod
    def remove(child: Child) -> None:
        """Forget `child`, which is gone, but not what it has begun."""
        del child.group.children[child.number]
        child.slot.jobs_begun += child.jobs_begun
        child.group.jobs_begun += child.jobs_begun

    # -- time

    def tick(self, child: Child, now: float) -> list[Action]:
        """Do what is due at `now`."""
        actions: list[Action] = []
        if child.startup_grace_until is not None and now >= child.startup_grace_until:
            child.startup_grace_until = None
            actions += self._heal(child.group) if child.proven else self.prove(child, now)
        if child.max_age_at is not None and now >= child.max_age_at:
            child.max_age_at = None
            age = now - child.spawned_at
            self.wear_out(child, f"it is {age:.0f} s old (max_age)")
        if child.deadline is not None and now >= child.deadline:
            actions += self._tick_deadline(child, now)
        self._alarm.set(child.startup_grace_until)
        self._alarm.set(child.max_age_at)
        self._alarm.set(child.deadline)
        return actions

    def _tick_deadline(self, child: Child, now: float) -> list[Action]:
        settings = child.group.settings
        if child.state is ChildState.STARTING:
            reason = child.reason or (
                f"it was not ready within {settings.start_timeout:g} s (start_timeout):"
                f" {_instead_of_ready(child)}"
            )
            actions = self.vacate(child, Cause.NOT_STARTED, reason, (), now)
            return [self.kill(child, signal.SIGKILL, now), *actions]
        if child.terminating:
            return [self.kill(child, signal.SIGKILL, now)]
        self.escalate_at(child, now + settings.stop_timeout, terminating=True)
        return [self.kill(child, signal.SIGTERM, now)]

    # -- size

    def grow(self, limit: int, now: float) -> list[Action]:
        """Let each group without its own size have the children that `limit` jobs need."""
        actions: list[Action] = []
        for group in self._elastic_groups():
            for _ in range(group.settings.size_for(limit) - len(group.slots)):
                slot = Slot(max((slot.number for slot in group.slots), default=-1) + 1)
                group.slots.append(slot)
                actions += self._refill(group, slot, now)
        return actions

    def can_shrink(self, limit: int) -> bool:
        """Return whether `shrink` would find enough children that may go."""
        return all(
            len(self._spare_slots(group)) >= self._surplus(group, limit)
            for group in self._elastic_groups()
        )

    def shrink(self, limit: int, now: float) -> list[Action]:
        """Take children from each group without its own size, so that it has as many as `limit`
        jobs need."""
        actions: list[Action] = []
        for group in self._elastic_groups():
            for slot in self._spare_slots(group)[::-1][: self._surplus(group, limit)]:
                group.slots.remove(slot)
                group.successors -= slot.successor is not None
                children = (slot.child, slot.successor)
                slot.child = slot.successor = None
                for child in children:
                    if child is not None:
                        actions += self._retire(child, now)
        return actions

    def _retire(self, child: Child, now: float) -> list[Action]:
        """Let `child`, which serves no slot any more, go once its jobs have ended."""
        if not child.jobs:
            return self.stop_gently(child, now)
        child.group.available.pop(child, None)
        self._worn.pop(child, None)
        return []

    @staticmethod
    def _surplus(group: Group, limit: int) -> int:
        return max(0, len(group.slots) - group.settings.size_for(limit))

    def _elastic_groups(self) -> list[Group]:
        return [group for group in self.groups.values() if group.settings.size is None]

    @staticmethod
    def _spare_slots(group: Group) -> list[Slot]:
        """Return the slots that may be taken away, the best last.

        Those whose child has nothing to do; and where children have many jobs at a time, for then
        none may ever be without one, also the others: such a child ends its jobs first.
        """
        busy, free = [], []
        for slot in group.slots:
            if slot.child is None or slot.child.state is not ChildState.BUSY:
                free.append(slot)
            elif slot.child.capacity > 1:
                busy.append(slot)
        return [*busy, *free]

    # -- facts

    def leaves(self, child: Child) -> bool:
        """Return whether what `child`, which is gone, has started goes on: if it went in good
        order, and as long as there is a worker."""
        keeps = child.group.settings.leftovers == "keep"
        return keeps and child.in_order and not self.stopping

    def move(self, child: Child, state: ChildState) -> None:
        """Let `child` be in another state.

        Raises:
            TransitionError: the table does not lead there.
        """
        if state not in TRANSITIONS[child.state]:
            raise TransitionError(f"{child!r} can't become {state.value}")
        child.state = state

    @property
    def booting(self) -> bool:
        """Whether the first child of a slot has still to prove itself, or to be gone after it
        failed to, which tells why."""
        return any(
            not child.proven
            and not child.unkillable
            and (child.state is ChildState.STOPPING or not child.slot.failures)
            for child in self
        )


def _instead_of_ready(child: Child) -> str:
    """Say what `child`, which is to greet, has done instead."""
    return (
        child.unfinished
        or child.near_greeting
        or (
            'it did not write {"status":"ready","protocol":1}, as its group\'s handshake asks it to'
        )
    )
