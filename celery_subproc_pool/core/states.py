"""The rules: which states jobs and children go through, and why.

Jobs
----

A job is one `apply_async`. It goes through these states (`JOB_TRANSITIONS`)::

    QUEUED ---dispatch--> RESERVED ---written--> SENT ---reply--> ANSWERED ---finish--> CLOSED
       ^                     | ^                  |
       +--- child is gone ---+ +--- not read -----+--- lost, timed out, terminated ---> CLOSED

QUEUED
    The job waits for a child and for a place below the limit.
RESERVED
    The job has a child. No byte of its request was written. If the job is traced from the start,
    its tracer prepares the request now. Otherwise the request is known from the start.
SENT
    The request was written, or at least its first bytes.
ANSWERED
    The child has replied, has broken the protocol, or has not ended the job after its soft limit.
    The tracer stores the result. A job without a tracer skips this state: its answer closes it.
CLOSED
    The job is over. Each state leads here: a job can be terminated at any time.

**A trace is a job too.** The job of an external child may need Celery's tracer (`Tracing`). Then it
has a second job, its trace (`Job.trace`), which goes through the same states with a tracer, a child
of the group `tracers`. Its request is the task message. When the trace comes to the body of the
task, the tracer asks for the exchange with the external child (`traces.Traces.asked`), and later it
is told the child's answer. Its reply tells how the trace ended. A trace counts for no limit, and
has no time limit of its own: when the job is ANSWERED, the trace inherits the hard one.

**If a job with a trace ends in another way, its trace is abandoned.** Celery is told of the end
when the tracer has let go of the job, or is gone: until then it may store an earlier state.

**If a tracer is lost, so are the jobs that it traces.** Their external children are ended as if the
jobs were terminated. A tracer that takes no more lines is ended: it can't be told what children
answer.

**What may have begun is never given to another child.** Only a RESERVED job goes back to the queue.
A SENT job becomes RESERVED again if its child has read no byte of the request and will read no
more. It may go back `jobs.MAX_REQUEUES` times. After the next lost child the job is given up: it
may be the cause.

**A late reply counts.** A child that takes no more requests may answer those that it has, within
their limits. A child that is being ended is heard until it has exited. Its replies still end jobs
that are SENT. They do not count if they report a failure, which may be due to the end, and not if
the worker stops: then all jobs that are left are given back. Replies to jobs that are over never
count.

**Ending a job before its child has answered ends the child**, with two exceptions. A child that
announced `cancel` is told to cancel the job. A child with other jobs is not killed for one of them.
In both cases the closed job stays in `Child.jobs` until the child answers it or `cancel_grace` is
over. The same holds, until `stop_timeout` is over, if the job was revoked by the signal that the
child knows as its soft time limit. The child gets no new job meanwhile (`pending_cancels`).

**An event only notes what happened.** `Scheduler.dispatch` hands out jobs, after all events of a
turn. So an unexpected line replaces its child before the child gets another job.

Children
--------

A group has slots. A slot has one child that serves it. The child goes through these states
(`CHILD_TRANSITIONS`)::

                 +-- not ready, exited, fault: the slot backs off, then spawns again
                 |
    STARTING --ready--> IDLE <--> BUSY --max_jobs reached--> RETIRING
                         |         |                            |
                         +---------+------ replaced ------------+----> STOPPING --exit--> GONE

A child is BUSY while it has a job, even if it has room for more. Most children have one job at a
time. A child that announced `multiplex` has up to `Child.capacity`.

**A child is recycled** when it has begun enough jobs, is too old, takes too much memory, or asks
for it. A successor boots beside it and takes the slot once it has proved that it works. The old
child serves until then. The exception is `max_jobs`, which is a promise: RETIRING children get no
more jobs. A busy child whose successor has taken the slot ends its jobs first.

**A child is replaced** after a fault. Its slot spawns at once if the child had done a job, and
backs off otherwise. A child that closed its stdin stays BUSY until it has answered the requests
that it has read (`Child.draining`); its slot is free already.

**A child with a handshake has proved itself** when it is ready. Any other child has proved itself
when it has lived for `booting.STARTUP_GRACE` seconds, or has replied.
"""

from __future__ import annotations

import enum

__all__ = ("CHILD_TRANSITIONS", "JOB_TRANSITIONS", "Cause", "ChildState", "JobState", "Tracing")


class JobState(enum.Enum):
    """The life of a job; see `JOB_TRANSITIONS`."""

    # Hashed for each job, as keys of the table. Each member exists once, so its identity will do,
    # and C hashes that.
    __hash__ = object.__hash__

    QUEUED = "queued"
    RESERVED = "reserved"
    SENT = "sent"
    ANSWERED = "answered"
    CLOSED = "closed"


#: From each state of a job, the states that may follow.
JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RESERVED, JobState.CLOSED}),
    JobState.RESERVED: frozenset({JobState.QUEUED, JobState.SENT, JobState.CLOSED}),
    JobState.SENT: frozenset({JobState.RESERVED, JobState.ANSWERED, JobState.CLOSED}),
    JobState.ANSWERED: frozenset({JobState.CLOSED}),
    JobState.CLOSED: frozenset(),
}


class Tracing(enum.Enum):
    """Whether a tracer has a part in a job."""

    __hash__ = object.__hash__

    #: None has: its child traces it, or it is no task.
    NEVER = "never"
    #: Only if its child answers anything else than `ok`.
    UNLESS_OK = "unless_ok"
    #: Only when its child has answered.
    AT_END = "at_end"
    #: From its acceptance on.
    ALWAYS = "always"


class ChildState(enum.Enum):
    """The life of a child; see `CHILD_TRANSITIONS`."""

    __hash__ = object.__hash__

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    RETIRING = "retiring"
    STOPPING = "stopping"
    GONE = "gone"


#: From each state of a child, the states that may follow.
CHILD_TRANSITIONS: dict[ChildState, frozenset[ChildState]] = {
    ChildState.STARTING: frozenset({ChildState.IDLE, ChildState.STOPPING, ChildState.GONE}),
    ChildState.IDLE: frozenset({ChildState.BUSY, ChildState.STOPPING, ChildState.GONE}),
    ChildState.BUSY: frozenset(
        {ChildState.IDLE, ChildState.RETIRING, ChildState.STOPPING, ChildState.GONE}
    ),
    ChildState.RETIRING: frozenset({ChildState.STOPPING, ChildState.GONE}),
    ChildState.STOPPING: frozenset({ChildState.GONE}),
    ChildState.GONE: frozenset(),
}


class Cause(enum.Enum):
    """Why a child was replaced, as `inspect stats` counts it."""

    EXITED = "exited"
    FAULTED = "faulted"
    NOT_STARTED = "not_started"
    TIMED_OUT = "timed_out"
    TERMINATED = "terminated"
    RECYCLED = "recycled"
    #: The worker stops.
    STOPPED = "stopped"
