"""What happens when a child breaks the protocol."""

from __future__ import annotations

import signal

from celery_subproc_pool.core.actions import (
    Accept,
    Forget,
    Kill,
    Report,
    Resolve,
    Spawn,
)
from celery_subproc_pool.core.model import (
    ChildState,
    Job,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Answered,
    Faulted,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    READ_NOTHING,
    World,
    child_of,
    ends,
    kills,
    kind,
    new_child,
    reports,
)


def test_a_reply_with_a_wrong_id_fails_the_job_and_replaces_the_child() -> None:
    world = World(a=kind())
    job, child = world.send("x")
    actions = world.tell(world.scheduler.replied, child, Ok(id="other"))
    reason = "the reply's id is 'other', the request's 'x'"
    assert actions == [
        Resolve(job, Faulted(reason), child),
        Kill(child, signal.SIGKILL),
        Report(child, reason, (job,), 0.1),
    ]
    assert (job.state, child.state) == (JobState.CLOSED, ChildState.STOPPING)
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]
    assert world.children() == []
    assert world.at(0.1) == [Spawn(world.children()[0])]


def test_a_fault_fails_the_job_and_replaces_the_child() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.faulted, child, "not JSON")
    assert ends(actions) == [Resolve(job, Faulted("not JSON"), child)]
    assert kills(actions) == [signal.SIGKILL]


def test_a_fault_of_an_idle_child_replaces_it() -> None:
    world = World(a=kind(2))
    child = world.children()[1]
    actions = world.tell(world.scheduler.faulted, child, "not JSON")
    assert actions == [Kill(child, signal.SIGKILL), Report(child, "not JSON", (), 0.1)]
    assert child_of(world.submit()) is world.children()[0]


def test_an_unexpected_reply_replaces_the_child_before_it_gets_a_job() -> None:
    world = World(a=kind(2))
    child = world.children()[1]
    job = Job("x", "t", "a")
    world.note(world.scheduler.submit, job)
    actions = world.note(world.scheduler.replied, child, Ok(id="x"))
    assert kills(actions) == [signal.SIGKILL]
    assert reports(actions)[0].reason.startswith("a reply that nobody asked for: Ok(")
    assert world.turn() == [Accept(job, world.children()[0], 0.0)]


def test_an_unexpected_reply_is_quoted_at_bounded_length() -> None:
    world = World(a=kind())
    (child,) = world.children()
    actions = world.tell(world.scheduler.replied, child, Ok(result="x" * 10_000))
    assert len(reports(actions)[0].reason) == 500


def test_two_replies_in_one_read_replace_the_child_before_it_gets_another_job() -> None:
    world = World(a=kind())
    job, child = world.send("x")
    waiting = world.submit("y")
    assert world.note(world.scheduler.replied, child, Ok(id="x")) == [
        Resolve(job, Answered(Ok(id="x")), child)
    ]
    actions = world.note(world.scheduler.replied, child, Ok(id="x"))
    assert kills(actions) == [signal.SIGKILL]
    assert ends(actions) == []
    # The child has done a job: its successor starts at once.
    (accepted,) = world.turn()
    assert accepted == Accept(waiting, new_child(actions), 0.0)
    assert job.state is JobState.CLOSED


def test_a_reply_before_the_request_replaces_the_child_and_requeues_the_job() -> None:
    world = World(a=kind(2))
    job = world.submit()
    first = child_of(job)
    actions = world.tell(world.scheduler.replied, first, Ok(id="x"))
    assert ends(actions) == []
    assert not any(isinstance(action, Accept) for action in actions)
    assert child_of(job) is not first
    assert not first.jobs


def test_what_a_child_says_after_a_fault_is_ignored() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.tell(world.scheduler.faulted, child, "first")
    assert world.tell(world.scheduler.replied, child, Ok()) == []
    assert world.tell(world.scheduler.faulted, child, "second") == []
    assert world.tell(world.scheduler.stdout_closed, child) == []
    assert world.tell(world.scheduler.unwritten, child, "third", READ_NOTHING) == []
    assert child.reason == "first"


def test_a_child_that_is_gone_is_not_replaced_again() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.tell(world.scheduler.exited, child, 0, READ_ALL)
    assert world.tell(world.scheduler.faulted, child, "Report failed") == []
