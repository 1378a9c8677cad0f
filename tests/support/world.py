"""A world for tests of the scheduler: its clock is a number, and it has no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from celery_subproc_pool.core.actions import (
    Action,
    Finished,
    Kill,
    Report,
    Resolve,
    Spawn,
    Started,
    Write,
)
from celery_subproc_pool.core.booting import STARTUP_GRACE
from celery_subproc_pool.core.model import (
    Child,
    Group,
    Job,
    Slot,
)
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.settings import ChildSettings
from celery_subproc_pool.wire.messages import Ok, Ready

#: An event of the scheduler's. Some have no consequences until jobs are dispatched.
Event = Callable[..., list[Action] | None]

STOP_TIMEOUT = 10.0

#: What was written to each child before its first request, and how much of that it has read.
BOOT = b"boot"
READ_NOTHING, READ_ALL = len(BOOT), 10**6

#: The greeting of a child without features.
READY = Ready(protocol=1)


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
        **kinds: ChildSettings,
    ) -> None:
        #: At 0, children without a handshake have proved themselves.
        self.now = -STARTUP_GRACE
        self.last_pid = 100
        self.spawns_fail = False
        #: The event that answers a `Write`.
        self.writes = "written"
        self.started: list[Child] = []
        self.children_boot_slowly = boot_slowly
        self.scheduler = Scheduler(
            {
                name: Group(name, settings, settings.size_for(limit))
                for name, settings in kinds.items()
            },
            limit,
            random,
        )
        self.perform(self.scheduler.start(self.now))
        self.at(0.0)

    def perform(self, actions: list[Action]) -> list[Action]:
        """Answer each `Spawn` and `Write`. Return all actions that followed, except `Started`."""
        todo, done = deque(actions), []
        while todo:
            action = todo.popleft()
            if isinstance(action, Started):
                self.started.append(action.child)
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
        """End a turn: do what is due, and dispatch."""
        due = self.perform(self.scheduler.tick(self.now))
        return due + self.perform(self.scheduler.dispatch(self.now))

    def tell(self, event: Event, *arguments: Any) -> list[Action]:
        """Tell one event that is alone in its turn."""
        return self.note(event, *arguments) + self.turn()

    def at(self, now: float) -> list[Action]:
        """Set the clock to `now`, and end the turn."""
        self.now = now
        return self.turn()

    def submit(self, task_id: str = "x", group: str | None = "a", **limits: float) -> Job:
        job = Job(task_id, f"task.{task_id}", group, **limits)
        self.tell(self.scheduler.submit, job)
        return job

    def send(self, task_id: str = "x", group: str = "a", **limits: float) -> tuple[Job, Child]:
        """Submit a job and write its request to a child."""
        job = self.submit(task_id, group, **limits)
        child = child_of(job)
        actions = self.tell(self.scheduler.provide, job, b"request")
        assert [action for action in actions if not isinstance(action, Spawn)] == [
            Write(child, job)
        ]
        return job, child

    def idle(self) -> bool:
        return self.scheduler.idle

    def children(self, group: str = "a") -> list[Child]:
        return list(self.scheduler.groups[group].children.values())

    def slots(self, group: str = "a") -> list[Slot]:
        return self.scheduler.groups[group].slots


def child_of(job: Job) -> Child:
    assert job.child is not None
    return job.child


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


def do(world: World, name: str = "x", **reply: Any) -> tuple[Child, list[Action]]:
    """Do one job. Return its child and the actions of its end."""
    job, child = world.send(name)
    actions = world.tell(world.scheduler.replied, child, Ok(**reply))
    return child, actions + world.tell(world.scheduler.finish, job)


def successor_of(child: Child) -> Child:
    assert child.slot.successor is not None
    return child.slot.successor
