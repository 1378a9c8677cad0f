"""For properties of traces: processes of tracers, and who is told of jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from celery_subproc_pool.core.actions import Accept, Action, Finished, Progressed, Resolve
from celery_subproc_pool.core.model import Child, Job, Tracing
from celery_subproc_pool.core.outcomes import (
    Answered,
    Faulted,
    Lost,
    Outcome,
    SoftTimedOut,
    TimedOut,
)
from celery_subproc_pool.wire.messages import Ok, Reply
from celery_subproc_pool.wire.python import Traced

from .test_properties import Process

__all__ = ("Owner", "Part", "Tracer", "left_to_tracer")


class Part:
    """What a tracer has read of a job, and has said of it."""

    def __init__(self, trace: Job, request: bytes, end: int) -> None:
        self.trace = trace
        #: All lines about it.
        self.heard = request
        #: How many bytes had been written to the tracer when it had them.
        self.end = end
        self.asked = self.abandoned = False

    @property
    def exchanges(self) -> bool:
        """Whether it has still to ask for the exchange with a child."""
        return self.heard.startswith(b"begin") and not self.asked and not self.abandoned

    @property
    def can_end(self) -> bool:
        """Whether it has all that it needs to come to its end."""
        return self.abandoned or not self.heard.startswith(b"begin") or b"answer" in self.heard


class Tracer(Process):
    """A tracer's process."""

    def __init__(self, child: Child) -> None:
        super().__init__(child)
        #: By the ids of the jobs that it has.
        self.parts: dict[str, Part] = {}
        #: The jobs whose trace it has ended.
        self.ended: set[Job] = set()
        #: How much it has read at least, as its messages show; and how much it can have read.
        self.read_at_least = 0
        self.readable: int | None = None
        #: Whether the worker has closed its stdin.
        self.told_to_exit = False

    def close_stdin(self) -> None:
        """It reads no more."""
        if self.stdin_open:
            self.stdin_open = False
            self.readable = self.written

    def begin(self, trace: Job) -> None:
        """It is written the request of `trace`."""
        self.parts[trace.task_id] = Part(trace, trace.request or b"", self.written)

    def hear(self, job: Job, line: bytes) -> Part | None:
        """It is written `line`, which is about `job`. Return its part, if that has not ended."""
        self.written += len(line)
        part = self.parts.get(job.task_id)
        if part is None or part.trace.traces is not job:
            assert job in self.ended, "a tracer hears only of jobs that it has begun"
            assert part is None, "what is about one job comes to no other one"
            return None
        part.heard += line
        part.end = self.written
        return part

    def speak(self, task_id: str, ends: bool) -> Part:
        """It says something of a job, so it has read its request; at its end, all of it."""
        part = self.parts[task_id]
        read = part.end if ends else self.offsets[part.trace] + 1
        self.read_at_least = max(self.read_at_least, read)
        if ends:
            del self.parts[task_id], self.asked[task_id]
            if part.trace.traces is not None:
                self.ended.add(part.trace.traces)
        return part

    def most_likely(self, read: int) -> int:
        """Return how many of its jobs it has read, if it may have read `read` of them."""
        offsets = [self.offsets[job] for job in self.asked.values()]
        least = sum(offset < self.read_at_least for offset in offsets)
        most = sum(self.readable is None or offset < self.readable for offset in offsets)
        return max(least, min(read, most))


def left_to_tracer(job: Job, outcome: Outcome) -> bool:
    """Return whether a tracer ends `job` after `outcome`."""
    if job.tracing is Tracing.NEVER:
        return False
    if job.tracing is Tracing.UNLESS_OK and isinstance(outcome, Answered):
        return not isinstance(outcome.reply, Ok)
    return isinstance(outcome, (Answered, Faulted, SoftTimedOut))


class Owner:
    """What `worker.runner.Runner` does with jobs, without Celery.

    Arguments:
        post: tells the scheduler of an event, by its name.
        name: returns a word for a job, which no other job has.
        look: is called when Celery is told of the end of a job.
    """

    def __init__(
        self,
        post: Callable[..., None],
        name: Callable[[Job], bytes],
        look: Callable[[Job], None],
    ) -> None:
        self._post = post
        self._name = name
        self._look = look
        #: How often Celery was told of the end of each job.
        self.told: Counter[Job] = Counter()
        #: Jobs that it gave up itself.
        self.given_up: set[Job] = set()
        #: Jobs whose end is told when their trace is over; what a probe precedes.
        self._ending: dict[Job, Outcome] = {}
        self._probes: set[Job] = set()
        #: Jobs for which a probe was begun.
        self.probed: set[Job] = set()
        #: All traces that were begun.
        self.traces: list[Job] = []

    def callback_of(self, action: Action) -> Callable[[], None] | None:
        """Return what is to be called after all actions."""
        if isinstance(action, Accept):
            return partial(self._accepted, action.job)
        if isinstance(action, Resolve):
            return partial(self._resolved, action.job, action.outcome, action.unfinished)
        if isinstance(action, Finished):
            return partial(self._finished, action.job, action.reply)
        if isinstance(action, Progressed):
            return partial(self._tell, action.job, b"progress")
        return None

    def _request(self, word: bytes, job: Job) -> bytes:
        return b"%s %s\n" % (word, self._name(job))

    def _begin(self, event: str, job: Job, request: bytes) -> None:
        before = job.trace
        self._post(event, job, request)
        if job.trace is not None and job.trace is not before:
            self.traces.append(job.trace)

    def _tell(self, job: Job, word: bytes) -> None:
        self._post("tell", job, self._request(word, job))

    def _accepted(self, job: Job) -> None:
        if job.tracing is Tracing.ALWAYS:
            self._begin("trace", job, self._request(b"begin", job))

    def _resolved(self, job: Job, outcome: Outcome, unfinished: bool) -> None:
        if job in self.given_up:
            return
        if left_to_tracer(job, outcome):
            if job.trace is None:
                begin, answer = self._request(b"begin", job), self._request(b"answer", job)
                self._begin("trace", job, begin + answer)
            else:
                self._tell(job, b"answer")
            return
        assert job not in self._ending, "a job has one end"
        self._ending[job] = outcome
        failed = isinstance(outcome, TimedOut) or (
            isinstance(outcome, Lost) and not outcome.stranded
        )
        # Every other task stores its result.
        if failed and job.tracing is not Tracing.NEVER and self._name(job)[-1] % 2:
            self._probes.add(job)
        if not unfinished:
            self._finished(job, None)

    def _finished(self, job: Job, reply: Reply | None) -> None:
        if job in self.given_up:
            return
        assert job in self._ending or isinstance(reply, Traced), "it is known how the job ended"
        if job in self._probes and not isinstance(reply, Traced):
            self._probes.discard(job)
            self.probed.add(job)
            self._begin("follow_up", job, self._request(b"probe", job))
            return
        self._look(job)
        self.told[job] += 1

    def give_up(self, job: Job) -> None:
        """Something of our own has failed."""
        if not self.told[job]:
            self.given_up.add(job)
            self.told[job] += 1
        self._post("give_up", job, "a bug")
