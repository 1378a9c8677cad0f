"""A world for tests of the scheduler: its clock is a number, and it has no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from celery_subproc_pool.core.actions import (
    Action,
    Finished,
    GoesOn,
    Kill,
    Report,
    Resolve,
    Spawn,
    StandsStill,
    Started,
    Write,
)
from celery_subproc_pool.core.booting import STARTUP_GRACE
from celery_subproc_pool.core.model import (
    Child,
    Group,
    Job,
    JobState,
    Slot,
    Tracing,
)
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.settings import TRACERS, ChildSettings
from celery_subproc_pool.wire.messages import Ok, Ready
from celery_subproc_pool.wire.python import Ask

#: An event of the scheduler's. Some have no consequences until jobs are dispatched.
Event = Callable[..., list[Action] | None]

STOP_TIMEOUT = 10.0

#: What was written to each child before its first request, and how much of that it has read.
BOOT = b"boot"
READ_NOTHING, READ_ALL = len(BOOT), 10**6

#: The request of a job that has none from its tracer.
REQUEST = b"request"

#: What is written to a tracer for a job.
TASK = b"task"

#: The greeting of a child without features.
READY = Ready(protocol=1)

#: The greeting of a tracer.
READY_TO_TRACE = Ready(protocol=1, features=("multiplex",))


def kind(size: int | None = 1, **settings: Any) -> ChildSettings:
    """Settings of a group; with a size of None it grows and shrinks."""
    return ChildSettings(argv=("true",), size=size, stop_timeout=STOP_TIMEOUT, **settings)


class World:
    """A scheduler, its clock, and children whose processes start at once."""

    def __init__(
        self,
        limit: int = 10,
        random: Callable[[], float] = lambda: 1.0,
        boot_slowly: bool = False,
        on_demand: str = "",
        **kinds: ChildSettings,
    ) -> None:
        #: At 0, children without a handshake have proved themselves.
        self.now = -STARTUP_GRACE
        self.last_pid = 100
        self.spawns_fail = False
        #: The event that answers a `Write`.
        self.writes = "written"
        self.started: list[Child] = []
        #: What the log was told of tracers that stand still.
        self.standstills: list[StandsStill | GoesOn] = []
        self.children_boot_slowly = boot_slowly
        self.scheduler = Scheduler(
            {
                name: Group(name, settings, settings.size_for(limit), on_demand=name == on_demand)
                for name, settings in kinds.items()
            },
            limit,
            random,
        )
        self.perform(self.scheduler.start(self.now))
        self.at(0.0)

    def perform(self, actions: list[Action]) -> list[Action]:
        """Answer each `Spawn` and `Write`. Return all actions that followed, except `Started` and
        those about tracers that stand still."""
        todo, done = deque(actions), []
        while todo:
            action = todo.popleft()
            if isinstance(action, Started):
                self.started.append(action.child)
                continue
            if isinstance(action, (StandsStill, GoesOn)):
                self.standstills.append(action)
                continue
            done.append(action)
            if isinstance(action, Spawn):
                todo.extend(self._spawn(action.child))
            elif isinstance(action, Write) and self.writes == "written":
                job, child = action.job, action.child
                self.scheduler.written(child, job, len(BOOT), self.now)
            elif isinstance(action, Write):
                event: Callable[..., list[Action]] = getattr(self.scheduler, self.writes)
                read = [READ_NOTHING] if self.writes == "unwritten" else []
                todo.extend(event(action.child, "third", *read, self.now))
        return done

    def _spawn(self, child: Child) -> list[Action]:
        if self.spawns_fail:
            return self.scheduler.spawn_failed(child, "no such program", self.now)
        self.last_pid += 1
        child.has_booted = not self.children_boot_slowly
        return self.scheduler.spawned(child, self.last_pid, self.now)

    def note(self, event: Event, *arguments: Any) -> list[Action]:
        """Tell one event, and perform its actions."""
        return self.perform(event(*arguments, self.now) or [])

    def turn(self) -> list[Action]:
        """End a turn: do what is due, and dispatch until that has no more consequences."""
        done = self.perform(self.scheduler.tick(self.now))
        while decided := self.scheduler.dispatch(self.now):
            done += self.perform(decided)
        return done

    def tell(self, event: Event, *arguments: Any) -> list[Action]:
        """Tell one event that is alone in its turn."""
        return self.note(event, *arguments) + self.turn()

    def at(self, now: float) -> list[Action]:
        """Set the clock to `now`, and end the turn."""
        self.now = now
        return self.turn()

    def submit(
        self,
        task_id: str = "x",
        group: str = "a",
        tracing: Tracing = Tracing.ALWAYS,
        **limits: float,
    ) -> Job:
        """Submit a job. If it is traced from its beginning, it stays RESERVED: it has no request
        until its tracer asks."""
        job = Job(task_id, f"task.{task_id}", group, tracing=tracing, **limits)
        if tracing is not Tracing.ALWAYS:
            job.request = REQUEST
        self.tell(self.scheduler.submit, job)
        return job

    def send(
        self,
        task_id: str = "x",
        group: str = "a",
        tracing: Tracing = Tracing.NEVER,
        **limits: float,
    ) -> tuple[Job, Child]:
        """Submit a job whose request is known, and that a child gets at once."""
        job = self.submit(task_id, group, tracing, **limits)
        assert job.state is JobState.SENT
        return job, child_of(job)

    def trace(self, job: Job, request: bytes = TASK) -> Job:
        """Begin the trace of `job`, and return it."""
        self.tell(self.scheduler.trace, job, request)
        return trace_of(job)

    def ask(self, job: Job) -> list[Action]:
        """Let the tracer of `job` ask for the exchange with its child."""
        ask = Ask(id=job.task_id, request=msgspec.Raw(REQUEST))
        return self.tell(self.scheduler.asked, child_of(trace_of(job)), ask)

    def send_traced(self, task_id: str = "x", **limits: float) -> tuple[Job, Child, Child]:
        """Submit a job, and let its tracer ask. Return the job, its child and its tracer."""
        job = self.submit(task_id, **limits)
        trace = self.trace(job)
        self.ask(job)
        assert job.state is trace.state is JobState.SENT
        return job, child_of(job), child_of(trace)

    def idle(self) -> bool:
        return self.scheduler.idle

    def children(self, group: str = "a") -> list[Child]:
        return list(self.scheduler.groups[group].children.values())

    def slots(self, group: str = "a") -> list[Slot]:
        return self.scheduler.groups[group].slots


def child_of(job: Job) -> Child:
    assert job.child is not None
    return job.child


def trace_of(job: Job) -> Job:
    assert job.trace is not None
    return job.trace


def kills(actions: list[Action]) -> list[int]:
    return [action.signum for action in actions if isinstance(action, Kill)]


def ends(actions: list[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, (Resolve, Finished))]


def reports(actions: list[Action]) -> list[Report]:
    return [action for action in actions if isinstance(action, Report)]


def new_child(actions: list[Action]) -> Child:
    (spawn,) = (action for action in actions if isinstance(action, Spawn))
    return spawn.child


#: The greeting of a child that can have as many jobs at a time as its group allows.
MANY = Ready(protocol=1, features=("multiplex", "cancel", "progress"))


def world_of_many(size: int | None, most: int, limit: int = 10, **settings: Any) -> World:
    """Return a world whose children are ready and can have `most` jobs each."""
    settings = {"handshake": True, "max_in_flight": most, **settings}
    world = World(limit=limit, a=kind(size, **settings))
    for child in world.children():
        world.tell(world.scheduler.ready, child, MANY, None)
    return world


def world_of(size: int = 1, **settings: Any) -> World:
    """Return a world of one group whose children have a handshake and are ready."""
    world = World(a=kind(size, handshake=True, **settings))
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    return world


def world_of_tracers(
    children: int = 1, tracers: int = 1, limit: int = 10, most: int = 9, **settings: Any
) -> World:
    """Return a world whose jobs can be traced.

    Arguments:
        children: how many children the group `a` has.
        tracers: how many tracers there are, all ready.
        limit: of jobs.
        most: how many jobs a tracer can have.
        settings: other settings of the tracers.
    """
    settings = {"handshake": True, "max_in_flight": most, "cancel_grace": 3.0, **settings}
    world = World(limit, a=kind(children), tracers=kind(tracers, **settings))
    for child in world.children(TRACERS):
        world.tell(world.scheduler.ready, child, READY_TO_TRACE, None)
    return world


def do(world: World, name: str = "x", **reply: Any) -> tuple[Child, list[Action]]:
    """Do one job. Return its child and the actions of its end."""
    _, child = world.send(name)
    return child, world.tell(world.scheduler.replied, child, Ok(**reply))


def successor_of(child: Child) -> Child:
    assert child.slot.successor is not None
    return child.slot.successor
