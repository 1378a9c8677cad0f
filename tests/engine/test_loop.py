"""The engine's loop without any process: order, re-entrancy, failures, deadlines, threads."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import FrameType
from typing import Any, get_args

import pytest

from celery_subproc_pool.core.actions import Action, CloseStdin, Finished, Kill
from celery_subproc_pool.core.model import Child, Group, Job
from celery_subproc_pool.engine import loop
from celery_subproc_pool.engine.loop import Loop
from celery_subproc_pool.errors import SpawnError
from celery_subproc_pool.settings import ChildSettings
from tests.support.basics import DEADLINE, wait_for


class Chore:
    """A `loop.Chore` that is due at a fixed time, and notes when it is looked at."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.looks: list[float] = []

    def look(self, now: float) -> None:
        self.looks.append(now)


class World:
    """A loop with a pretend scheduler and clock. `log` says what happened, in order.

    `reactions` holds what is done when something is logged: an action is performed, an event told.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 100.0
        self.next_deadline: float | None = None
        self.reactions: dict[str, Callable[[], object]] = {}
        self.failures: list[Exception] = []
        self.announced: list[float] = []
        self.dispatched: list[Action] = []
        self.loop = Loop(
            self,
            dict.fromkeys(get_args(Action), self.perform),
            self.failures.append,
            lambda: self.now,
        )
        self.loop.on_deadline = self.announced.append

    def happens(self, what: str) -> None:
        self.log.append(what)
        reaction = self.reactions.pop(what, None)
        if reaction is not None:
            reaction()

    # -- loop.Decider

    def tick(self, now: float) -> list[Action]:
        self.happens("tick")
        return []

    def dispatch(self, now: float) -> list[Action]:
        self.happens("dispatch")
        decided, self.dispatched = self.dispatched, []
        return decided

    def faulted(self, child: Child, reason: str, now: float) -> list[Action]:
        self.happens(f"faulted: {reason}")
        return []

    # -- what else happens

    def perform(self, action: Action) -> None:
        self.happens(type(action).__name__)

    def event(self, name: str, *decided: Action) -> Callable[[float], list[Action]]:
        """Return an event from which actions follow."""

        def event(now: float) -> list[Action]:
            self.happens(name)
            return list(decided)

        return event

    def post(self, name: str, *decided: Action) -> None:
        self.loop.post(self.event(name, *decided))

    def call(self, name: str) -> None:
        self.loop.call(partial(self.happens, name))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loop.close()


def child() -> Child:
    group = Group("a", ChildSettings(argv=("true",)), 1)
    return Child(group, group.slots[0], 1)


CHILD = child()
KILL, CLOSE = Kill(CHILD, 9), CloseStdin(CHILD)
#: An action that is about no child.
FINISHED = Finished(Job("x", "task", "a"), None)


def fail(error: Exception | None = None) -> None:
    raise error or ZeroDivisionError("injected")


# -- order


def test_a_posted_event_has_taken_effect_when_post_returns(world: World) -> None:
    world.post("event", KILL)
    assert world.log == ["event", "dispatch", "Kill"]
    assert not world.loop.turning


def test_arguments_come_before_the_time(world: World) -> None:
    told: list[Any] = []
    world.loop.post(lambda *arguments: told.append(arguments) or [], 1, "two")
    assert told == [(1, "two", world.now)]


def test_all_events_are_told_before_jobs_are_handed_out(world: World) -> None:
    world.reactions["callback"] = lambda: (world.post("first", KILL), world.post("second"))
    world.dispatched = [CLOSE]
    world.call("callback")
    assert world.log == ["callback", "first", "second", "dispatch", "Kill", "CloseStdin"]


def test_callbacks_run_after_all_actions(world: World) -> None:
    world.reactions["Kill"] = partial(world.loop.call_later, partial(world.happens, "callback"))
    world.post("event", KILL, CLOSE)
    assert world.log == ["event", "dispatch", "Kill", "CloseStdin", "callback"]


def test_what_one_callback_causes_is_done_before_the_next_callback(world: World) -> None:
    world.reactions["event"] = lambda: (world.call("first"), world.call("second"))
    world.reactions["first"] = partial(world.post, "caused", KILL)
    world.post("event")
    assert world.log == ["event", "dispatch", "first", "caused", "dispatch", "Kill", "second"]


def test_jobs_are_handed_out_anew_only_after_the_scheduler_was_told_something(
    world: World,
) -> None:
    world.reactions["Kill"] = partial(world.loop.tell, world.event("told", CLOSE))
    world.reactions["CloseStdin"] = partial(world.loop.note, world.event("noted", KILL))
    world.post("event", KILL, FINISHED)
    assert world.log == [
        *("event", "dispatch", "Kill", "told", "Finished", "CloseStdin", "noted", "dispatch")
    ]
    world.log.clear()
    world.call("callback")
    assert world.log == ["callback"]


def test_a_turn_serves_descriptors_then_chores_then_the_clock(world: World) -> None:
    chore = Chore(None)
    world.loop.chores.add(chore)
    with readable_pipe() as descriptor:
        world.loop.selector.watch(descriptor, partial(world.happens, "served"))
        world.reactions["served"] = partial(world.loop.tell, world.event("event", KILL))
        world.loop.turn()
        assert world.log == ["served", "event", "tick", "dispatch", "Kill"]
        assert chore.looks == [world.now]
        world.loop.selector.unwatch(descriptor)
        world.loop.selector.unwatch(descriptor)
        world.loop.turn()
    assert world.log.count("served") == 1


@contextmanager
def readable_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.write(writer, b"x")
    yield reader
    os.close(reader)
    os.close(writer)


# -- coming back


def test_an_event_from_a_callback_waits_for_the_end_of_the_callback(world: World) -> None:
    def callback() -> None:
        world.post("event", KILL)
        assert "event" not in world.log
        world.happens("end of the callback")

    world.loop.call(callback)
    assert world.log == ["end of the callback", "event", "dispatch", "Kill"]


@pytest.mark.parametrize("moment", ["first", "dispatch", "Kill", "CloseStdin", "callback", "tick"])
def test_a_signal_handler_leaves_its_event_to_the_turn_that_it_interrupts(
    world: World, moment: str
) -> None:
    """A handler runs on the same thread, in the midst of anything."""

    def handler() -> None:
        assert world.loop.turning
        assert world.loop.on_own_thread
        world.post("handled", FINISHED)
        world.loop.turn()
        assert "handled" not in world.log

    world.reactions[moment] = handler
    world.call("callback")
    world.post("first", KILL, CLOSE)
    world.loop.turn()
    assert "handled" in world.log
    assert world.log[world.log.index("handled") :].count("Finished") == 1
    assert not world.loop.turning


@pytest.mark.parametrize("way", ["post", "turn"])
def test_a_signal_handler_at_any_line_of_the_loop_has_its_event_handled(way: str) -> None:
    """Also between the last look at the inbox and the end of the turn."""
    for line in count(1):
        world = World()
        try:
            with interrupted_at(line, partial(world.post, "handled", FINISHED)) as interrupted:
                if way == "post":
                    world.post("event", KILL)
                else:
                    world.loop.turn()
        finally:
            world.loop.close()
        if not interrupted:
            break
        assert world.log.count("handled") == world.log.count("Finished") == 1, line
    assert line > 20, "nothing was interrupted"


@contextmanager
def interrupted_at(line: int, handler: Callable[[], None]) -> Iterator[list[int]]:
    """Call `handler` before the `line`-th line of the loop that is run. Give where that was."""
    left, interrupted = line, []

    def trace(frame: FrameType, what: str, argument: Any) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code.co_filename != loop.__file__:
            return None
        left -= what == "line"
        if left == 0 and not interrupted:
            interrupted.append(frame.f_lineno)
            handler()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield interrupted
    finally:
        sys.settrace(before)


# -- other threads


def in_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(DEADLINE)


def test_an_event_from_another_thread_wakes_the_loop_and_is_told_by_its_own_thread(
    world: World,
) -> None:
    threads: list[int] = []
    world.reactions["event"] = lambda: threads.append(threading.get_ident())
    in_thread(partial(world.post, "event"))
    assert world.log == []
    assert select.select([world.loop], [], [], 0)[0]
    world.loop.turn(DEADLINE)
    assert world.log == ["tick", "event", "dispatch"]
    assert threads == [threading.get_ident()]
    assert not select.select([world.loop], [], [], 0)[0]


def test_the_loops_own_thread_is_the_one_that_turned_it_last(world: World) -> None:
    in_thread(world.loop.turn)
    world.log.clear()
    assert not world.loop.on_own_thread
    world.post("event")
    assert world.log == []
    world.loop.turn()
    assert world.loop.on_own_thread
    assert world.log == ["tick", "event", "dispatch"]


# -- asking


def who() -> str:
    return threading.current_thread().name


@contextmanager
def turned_by_a_thread(world: World) -> Iterator[Loop]:
    end = threading.Event()

    def turn() -> None:
        while not end.is_set():
            world.loop.turn(DEADLINE)

    thread = threading.Thread(target=turn, name="turns")
    thread.start()
    wait_for(lambda: not world.loop.on_own_thread, "the first turn")
    try:
        yield world.loop
    finally:
        end.set()
        world.loop.wake()
        thread.join(DEADLINE)


def test_a_question_from_another_thread_is_answered_by_the_loops_own(world: World) -> None:
    with turned_by_a_thread(world) as turned:
        assert turned.ask(who, DEADLINE) == "turns"
        with pytest.raises(ZeroDivisionError):
            turned.ask(fail, DEADLINE)
        assert turned.ask(who, DEADLINE) == "turns"


def test_a_question_on_the_loops_own_thread_is_answered_at_once(world: World) -> None:
    answers: list[str] = []
    world.reactions["Kill"] = lambda: answers.append(world.loop.ask(who, DEADLINE))
    world.post("event", KILL)
    assert answers == [who()]


@pytest.mark.parametrize("end", ["failed", "closed"])
def test_a_loop_that_has_failed_or_is_closed_is_not_waited_for(world: World, end: str) -> None:
    ended = Loop(world, {}, world.failures.append)
    in_thread(ended.turn)
    ended.failed = end == "failed"
    if end == "closed":
        ended.close()
    begin = time.monotonic()
    assert ended.ask(who, DEADLINE) == who()
    assert time.monotonic() < begin + DEADLINE / 2
    if end == "failed":
        ended.close()


def test_a_loop_that_hangs_is_not_waited_for_and_gives_no_late_answer(world: World) -> None:
    hangs, go_on = threading.Event(), threading.Event()
    asked: list[str] = []
    with turned_by_a_thread(world) as turned:
        turned.call(lambda: (hangs.set(), go_on.wait(DEADLINE)))
        hangs.wait(DEADLINE)
        turned.ask(lambda: asked.append(who()), 0.05)
        go_on.set()
        assert turned.ask(who, DEADLINE) == "turns"
    assert asked == [who()]


# -- failures


def test_an_action_that_raises_costs_its_child_and_the_loop_goes_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.reactions["Kill"] = fail
    world.post("event", KILL, CLOSE)
    fault = "faulted: Kill failed: ZeroDivisionError('injected')"
    assert world.log == ["event", "dispatch", "Kill", fault, "CloseStdin", "dispatch"]
    assert "Kill failed" in caplog.messages
    assert not world.loop.failed


def test_an_action_without_a_child_that_raises_is_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.reactions["Finished"] = fail
    world.post("event", FINISHED, KILL)
    assert world.log == ["event", "dispatch", "Finished", "Kill"]
    assert "Finished failed" in caplog.messages
    assert not world.loop.failed


def test_a_callback_that_raises_is_logged_and_the_next_one_runs(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.reactions["event"] = lambda: (world.call("first"), world.call("second"))
    world.reactions["first"] = fail
    world.post("event")
    assert world.log[-2:] == ["first", "second"]
    assert "A callback failed; the pool goes on" in caplog.messages
    assert not world.loop.failed


@pytest.mark.parametrize(
    "moment", ["event", "dispatch", "tick", "faulted: Kill failed: KeyError()"]
)
def test_a_scheduler_that_raises_makes_the_loop_fail_once(world: World, moment: str) -> None:
    world.reactions["Kill"] = partial(fail, KeyError())
    world.reactions[moment] = fail
    world.post("event", KILL, CLOSE)
    world.loop.turn()
    assert world.loop.failed
    assert [type(error) for error in world.failures] == [ZeroDivisionError]
    log = list(world.log)
    world.post("later")
    world.call("later")
    world.loop.turn()
    world.loop.turn_at_deadline()
    assert world.log == log
    assert len(world.failures) == 1
    assert not world.loop.turning


def test_a_descriptor_that_is_served_wrongly_makes_the_loop_fail(world: World) -> None:
    with readable_pipe() as descriptor:
        world.loop.selector.watch(descriptor, fail)
        world.loop.turn()
    assert world.loop.failed
    assert len(world.failures) == 1
    assert world.log == []


def test_a_spawn_error_at_the_start_is_raised_and_is_no_failure(world: World) -> None:
    world.reactions["Kill"] = partial(fail, SpawnError("no such program"))
    with pytest.raises(SpawnError, match="no such program"):
        world.loop.begin(world.event("start", KILL, CLOSE))
    assert world.log == ["start", "dispatch", "Kill"]
    assert not world.loop.failed
    assert not world.loop.turning


def test_the_thread_that_begins_owns_the_loop(world: World) -> None:
    in_thread(partial(world.loop.begin, world.event("start", KILL)))
    assert world.log == ["start", "dispatch", "Kill"]
    assert not world.loop.on_own_thread


# -- deadlines


def test_a_deadline_is_announced_again_only_when_it_has_changed(world: World) -> None:
    world.post("nothing is due")
    assert world.announced == []
    world.next_deadline = 105.0
    world.post("it is new")
    world.post("it is the same")
    world.loop.turn()
    assert world.announced == [105.0]
    world.next_deadline = 107.0
    world.post("it has changed")
    assert world.announced == [105.0, 107.0]


def test_a_turn_at_a_deadline_announces_it_even_if_it_is_the_same(world: World) -> None:
    world.next_deadline = 105.0
    world.loop.turn()
    world.loop.turn_at_deadline()
    assert world.announced == [105.0, 105.0]


def test_a_loop_that_has_failed_announces_nothing(world: World) -> None:
    world.next_deadline = 105.0
    world.reactions["event"] = fail
    world.post("event")
    assert world.announced == []


@pytest.mark.parametrize(
    ("of_scheduler", "of_chores", "soonest"),
    [
        (None, [None, None], None),
        (105.0, [None, None], 105.0),
        (None, [None, 103.0], 103.0),
        (105.0, [103.0, 104.0], 103.0),
        (105.0, [107.0, None], 105.0),
    ],
)
def test_the_soonest_deadline_counts(
    world: World, of_scheduler: float | None, of_chores: list[float | None], soonest: float | None
) -> None:
    world.next_deadline = of_scheduler
    for deadline in of_chores:
        world.loop.chores.add(Chore(deadline))
    world.loop.turn()
    assert world.announced == ([] if soonest is None else [soonest])
    assert world.loop.wait_time(60.0) == (60.0 if soonest is None else soonest - world.now)
    assert world.loop.wait_time(1.0) == 1.0


def test_a_chore_is_looked_at_in_each_turn_until_it_has_no_deadline(world: World) -> None:
    chore = Chore(105.0)
    world.loop.chores.add(chore)
    world.loop.chores.add(chore)
    for _ in range(2):
        world.loop.turn()
    chore.deadline = None
    for _ in range(2):
        world.loop.turn()
    assert chore.looks == [world.now] * 3
    world.loop.chores.add(chore)
    world.loop.turn()
    assert len(chore.looks) == 4


def test_a_deadline_that_is_over_is_not_waited_for(world: World) -> None:
    world.next_deadline = world.now - 1.0
    assert world.loop.wait_time(60.0) == 0.0


def test_a_closed_loop_does_nothing(world: World) -> None:
    closed = Loop(world, {}, world.failures.append)
    closed.close()
    closed.turn()
    closed.wake()
    assert world.log == []
