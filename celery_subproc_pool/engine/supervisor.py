"""The engine: owns every child process, and performs what the scheduler decides.

Layer: above `scheduler`, `live`, `guardian` and `wakeup`. Must not import Celery; it reports
through a `Listener`. One thread turns it: the one that runs the worker's event loop, to which the
engine is a single descriptor (`fileno`) and a timer (`on_deadline`), or a thread of its own.

    other threads ---- post ---> inbox --+
                                         v
    pipes, exits ---> selector ---> scheduler (decides) ---> actions ---> pipes, signals, spawns
                                                                 |
                                                                 +------> Listener, last of all

Callbacks come last because they come back: Celery may call `post` from inside of one.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Protocol, TypeVar

from ..core import actions, model, outcomes
from ..core.actions import Action, Change
from ..core.model import Child, JobState
from ..core.outcomes import ChildFacts, Outcome
from ..core.scheduler import Scheduler
from ..errors import ProtocolFault, SpawnError
from ..wire.messages import CancelReason, Fatal, Log, Message, Progress, Ready, Reply, encode_cancel
from ..wire.text import quote
from . import programs, reports
from .forks import keep_from_copies
from .guardian import MARK, Guardian
from .memory import MemoryMeter
from .process import KILL_GRACE, ChildProcess, pidfd
from .remains import Remains
from .running import RunningChild
from .wakeup import Wakeup

__all__ = ("Listener", "Supervisor")

logger = logging.getLogger("celery_subproc_pool")

#: Seconds between looks at children whose exit no descriptor tells.
POLL_INTERVAL = 0.1

#: Seconds from the end of a child's stdout to its own, if that is how it ends: a moment.
EXIT_PATIENCE = 0.01

#: The environment variable that tells a child its place in its group, from 0 on.
SLOT = "CELERY_SUBPROC_POOL_SLOT"

#: The environment variable that tells one Python child to say what is odd about the project.
FIRST = "CELERY_SUBPROC_POOL_FIRST"

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


_T = TypeVar("_T")

#: Actions of which the scheduler hears no more.
_WITHOUT_FEEDBACK = (actions.Accept, actions.Resolve, actions.Finished, actions.Overruled)


class Listener(Protocol):
    """Who owns the jobs. Called on the thread that turns the engine."""

    def accepted(self, job: Any, child: Child | None, now: float) -> None:
        """`job` was handed to `child` (None: to the worker itself) at monotonic time `now`."""

    def resolved(self, job: Any, outcome: Outcome, facts: ChildFacts | None) -> None:
        """The time of `job` with a child is over."""

    def finished(self, job: Any) -> None:
        """The tracer of `job` is through, and nothing else ended it."""

    def soft_timed_out(self, job: Any, told: bool) -> None:
        """The soft time limit of `job` is over; `told` is whether its child was signalled."""

    def overruled(self, job: Any) -> None:
        """The child of `job`, which was settled as terminated before, is through with it."""

    def progressed(self, job: Any, meta: dict[str, Any]) -> None:
        """The child of `job` told how far it is."""

    def child_changed(self, change: Change) -> None:
        """A child came into service, or another has replaced it."""

    def failed(self, error: Exception) -> None:
        """The engine has failed with `error`, and does nothing any more. Told once."""


class Supervisor:
    """The engine. See this module's docstring.

    Arguments:
        scheduler: decides.
        listener: is told about jobs.
        environ: the environment that children start from.
        clock: monotonic time in seconds; `time.monotonic`, because Celery's is.
        owner: the worker's node name, for those who look at processes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        listener: Listener,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        owner: str = "",
    ) -> None:
        self.scheduler = scheduler
        #: Called with a monotonic time when the engine must be turned then, at the latest.
        self.on_deadline: Callable[[float], None] = lambda deadline: None
        self._listener = listener
        self._environ = dict(environ)
        self._clock = clock
        self._owner_name = owner
        self._live: dict[int, RunningChild] = {}
        #: Children whose exit no descriptor tells.
        self._polled: set[RunningChild] = set()
        # epoll or kqueue, which are descriptors themselves: all systems that this runs on have one.
        self._selector: Any = selectors.DefaultSelector()
        self._wakeup = Wakeup()
        self._selector.register(self._wakeup, _READ, self._on_wake)
        self._inbox: deque[tuple[Callable[..., list[Action]], tuple[Any, ...]]] = deque()
        self._actions: deque[Action] = deque()
        self._callbacks: deque[Callable[[], None]] = deque()
        self._owner = threading.get_ident()
        self._turning = False
        self._starting = False
        self._closed = False
        #: Whether something that must not happen has happened, in the engine itself: what it knows
        #: may be half true, so it does nothing any more.
        self.failed = False
        self._announced: float | None = None
        self._meter = MemoryMeter()
        self._guardian: Guardian | None = None
        self._guardian_fd: int | None = None
        self._remains = Remains(self._forget_group)
        keep_from_copies(self)
        self._perform: dict[type, Callable[[Any], None]] = {
            actions.Spawn: self._spawn,
            actions.Accept: self._accept,
            actions.Write: self._write,
            actions.Resolve: self._resolve,
            actions.Finished: self._finished,
            actions.SoftTimeout: self._soft_timeout,
            actions.Cancel: self._cancel,
            actions.Interrupt: self._interrupt,
            actions.Overruled: self._overruled,
            actions.Progressed: self._progressed,
            actions.Logged: self._logged,
            actions.Kill: self._kill,
            actions.Unkillable: reports.unkillable,
            actions.Stranded: reports.stranded,
            actions.CloseStdin: self._close_stdin,
            actions.Started: self._tell,
            actions.Report: self._report,
            actions.Recycled: self._recycled,
            actions.Healed: lambda action: reports.healed(action.group),
            actions.Probe: self._probe,
            actions.Measure: self._measure,
            actions.Forget: self._forget,
        }

    # -- for the owner

    def start(self) -> None:
        """Spawn all children.

        Raises:
            SpawnError: one could not be started; those that could are gone again.
        """
        self._owner = threading.get_ident()
        self._guardian = Guardian(self._owner_name)
        self._watch_guardian()
        self._starting = True
        try:
            self._actions.extend(self.scheduler.start(self._clock()))
            self._run_until_idle()
        except SpawnError:
            self.kill_all()
            raise
        finally:
            self._starting = False

    def fileno(self) -> int:
        """Return the descriptor that is readable when `turn` has something to do."""
        descriptor: int = self._selector.fileno()
        return descriptor

    def post(self, event: Callable[..., list[Action]], *arguments: Any) -> None:
        """Tell the scheduler of an event, from any thread.

        On the engine's own thread it takes effect before this returns, unless the engine is
        being turned right now: then at the end of that turn.

        Arguments:
            event: a method of the scheduler that takes the time as its last argument.
            arguments: those before the time.
        """
        self._inbox.append((event, arguments))
        self._look()

    def _look(self) -> None:
        """Have the engine look at what was brought to it."""
        if not self.on_own_thread:
            self.wake()
        elif not self._turning:
            self._run_until_idle()

    def call(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the thread that turns the engine, from any thread: after what
        it decides and does now, as all callbacks."""
        self._callbacks.append(callback)
        self._look()

    def ask(self, question: Callable[[], _T], patience: float) -> _T:
        """Return what `question` returns, or raise what it raises, from any thread.

        It is called on the thread that turns the engine: nothing changes meanwhile of what it looks
        at. If that thread hangs, or there is none any more, it is called here.

        Arguments:
            question: looks, and changes nothing.
            patience: seconds to wait for the engine, which may be in the midst of a turn.
        """
        if self.on_own_thread or self.failed or self._closed:
            return question()
        answer: Future[_T] = Future()
        self.call(partial(_answer, answer, question))
        wait([answer], patience)
        return question() if answer.cancel() else answer.result()

    def terminate(self, job: model.Job, signum: int, reason: CancelReason) -> None:
        """End `job`, from any thread, unless its reply is there already: one that came in time
        is not late because nobody has read it yet."""
        self.post(self._terminate, job, signum, reason)

    def _terminate(
        self, job: model.Job, signum: int, reason: CancelReason, now: float
    ) -> list[Action]:
        live = None if job.child is None else self._live.get(job.child.number)
        if live is not None:
            self._guarded(self._on_stdout, live, 0)
        return self.scheduler.terminate(job, signum, now, reason)

    def turn(self, timeout: float = 0.0) -> None:
        """Serve all descriptors that are ready, then do what follows from it.

        Arguments:
            timeout: seconds to wait for one to become ready.
        """
        if self._turning or self._closed or self.failed:
            return
        self._owner = threading.get_ident()
        self._turning = True
        try:
            for key, mask in self._selector.select(timeout):
                key.data(mask)
            for live in tuple(self._polled):
                self._guarded(self._on_exit, live, 0)
            if self._remains.deadline is not None:
                self._remains.look(self._clock())
            # After the pipes: a reply that came in time is not late because we are.
            self._actions.extend(self.scheduler.tick(self._clock()))
        except Exception as exc:
            self._fail(exc)
        finally:
            self._turning = False
        self._run_until_idle()

    def turn_at_deadline(self) -> None:
        """Turn, and announce the next deadline anew even if it is still the same."""
        self._announced = None
        self.turn()

    @property
    def on_own_thread(self) -> bool:
        """Whether this is asked on the thread that turns the engine."""
        return threading.get_ident() == self._owner

    @property
    def turning(self) -> bool:
        """Whether the engine is being turned: if asked on its own thread, by whom we interrupt."""
        return self._turning

    def wake(self) -> None:
        """Make a `turn` that waits return, from any thread; a tracer may be slower than the
        worker's end, when there is none."""
        self._wakeup.wake()

    def wait_time(self, longest: float) -> float:
        """Return for how many seconds `turn` may wait: at most `longest`."""
        deadline = self._deadline()
        return longest if deadline is None else min(max(deadline - self._clock(), 0.0), longest)

    @property
    def processes(self) -> list[int]:
        """The pids of all children."""
        return [live.process.pid for live in list(self._live.values())]

    @property
    def writing(self) -> int:
        """How many children have still to read the rest of a request."""
        return sum(live.writing for live in list(self._live.values()))

    @property
    def awaited(self) -> bool:
        """Whether a child is left that will exit: one that can't be killed may not."""
        return any(not live.child.unkillable for live in list(self._live.values()))

    def memory_of(self, child: Child) -> int:
        """Return the resident memory of `child` and what it started, in bytes; 0 if it is gone."""
        live = self._live.get(child.number)
        return 0 if live is None else self._meter.measure(live.process.pid, self._clock())

    def kill_all(self) -> None:
        """Kill every child and forget it, whatever state it is in. No callback is made.

        Safe in a signal handler: it relies on nothing that a turn may have left half done.
        """
        self.scheduler.abandon()
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            self._tell_leftovers(guardian)
        for live in list(self._live.values()):
            live.child.unkillable |= not live.kill(signal.SIGKILL)
        if guardian is not None:
            self._watch_guardian()
            # It ends what is left; the children are reaped after that, see `remains`.
            guardian.close()
        end = self._clock() + KILL_GRACE
        left = []
        for number, live in list(self._live.items()):
            self._unregister(live)
            live.process.kill(signal.SIGKILL)
            patience = 0.0 if live.child.unkillable else max(end - self._clock(), 0.0)
            if not live.process.wait(patience):
                left.append(live.process.pid)
            live.process.close()
            self._live.pop(number, None)
        if left:
            reports.left_behind(left)
        self._remains.finish()

    def _tell_leftovers(self, guardian: Guardian) -> None:
        """Log what ends with the worker, and is no child: what children have left running."""
        children = {pid for live in self._live.values() for pid in (live.process.pid, live.pid)}
        # What belongs to a child that is killed with all that it has, or was told of before.
        groups = set(self._remains.groups)
        for live in self._live.values():
            if live.child.group.settings.leftovers == "kill":
                groups.add(live.process.pid)
        strays = [pid for pid in guardian.descendants() if pid not in children]
        for members in programs.members(groups).values() if strays else ():
            strays = [pid for pid in strays if pid not in members]
        if titles := programs.titles(strays):
            reports.left_over(titles)

    def close(self) -> None:
        """Give back all resources, once no child is left."""
        self.kill_all()
        self._closed = True
        self._selector.close()
        self._wakeup.close()

    def disown(self) -> None:
        """In a forked copy of this process: close what is open, and touch no child."""
        if self._closed:
            return
        for live in self._live.values():
            live.process.close()
        self._live.clear()
        self._remains = Remains(self._forget_group)
        if self._guardian is not None:
            self._guardian.disown()
            self._guardian = None
        if self._guardian_fd is not None:
            os.close(self._guardian_fd)
            self._guardian_fd = None
        self._closed = True
        self._selector.close()
        self._wakeup.disown()

    # -- the turn

    def _run_until_idle(self) -> None:
        """Do what follows from what is known, until nothing does."""
        while not self._turning and not self.failed:
            self._turning = True
            try:
                self._run_to_rest()
            except SpawnError:
                raise
            except Exception as exc:
                self._fail(exc)
            finally:
                self._turning = False
            # A signal handler that saw the turn go on has left its event to it.
            if not self._inbox and not self._callbacks:
                break
        if not self.failed:
            self._announce()

    def _fail(self, error: Exception) -> None:
        """Stand still, and tell whose engine this is."""
        self.failed = True
        self._listener.failed(error)

    def _run_to_rest(self) -> None:
        inbox, actions, callbacks = self._inbox, self._actions, self._callbacks
        #: Whether the scheduler was told something since it has handed out jobs.
        told = True
        while True:
            while inbox:
                event, arguments = inbox.popleft()
                actions.extend(event(*arguments, self._clock()))
                told = True
            if told:
                actions.extend(self.scheduler.dispatch(self._clock()))
                told = False
            if actions:
                while actions:
                    action = actions.popleft()
                    self._do(action)
                    told = told or type(action) not in _WITHOUT_FEEDBACK
            elif callbacks:
                self._call_back(callbacks.popleft())
            else:
                return

    def _do(self, action: Action) -> None:
        try:
            self._perform[type(action)](action)
        except SpawnError:
            raise
        except Exception as exc:
            child: Child | None = getattr(action, "child", None)
            logger.exception("%s failed", type(action).__name__)
            if child is not None:
                reason = f"{type(action).__name__} failed: {exc!r}"
                self._actions.extend(self.scheduler.faulted(child, reason, self._clock()))

    def _call_back(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("A callback failed; the pool goes on")

    def _announce(self) -> None:
        deadline = self._deadline()
        if deadline is not None and deadline != self._announced:
            self._announced = deadline
            self.on_deadline(deadline)

    def _deadline(self) -> float | None:
        deadline = self.scheduler.next_deadline
        soon = self._remains.deadline
        if self._polled:
            # Sooner than `Remains` looks again, or as soon.
            soon = self._clock() + POLL_INTERVAL
        if soon is None or deadline is None:
            return deadline if soon is None else soon
        return min(soon, deadline)

    def _on_wake(self, mask: int) -> None:
        self._wakeup.clear()

    # -- actions

    def _spawn(self, action: actions.Spawn) -> None:
        child = action.child
        settings = child.group.settings
        # A child that gets to read how to boot also knows what to do with two of them.
        handover = settings.stderr == "inherit" and child.group.boot
        stderr = "handover" if handover else settings.stderr
        try:
            process = ChildProcess(settings.command, self._environment(child), settings.cwd, stderr)
        except SpawnError as exc:
            if self._starting:
                raise
            self._actions.extend(self.scheduler.spawn_failed(child, str(exc), self._clock()))
            return
        live = RunningChild(child, process)
        try:
            self._watch(live)
        except OSError as exc:
            # Out of descriptors, or of the selector's memory: not out of control.
            process.kill(signal.SIGKILL)
            process.wait()
            self._unregister(live)
            process.close()
            self._actions.extend(self.scheduler.spawn_failed(child, str(exc), self._clock()))
            return
        self._live[child.number] = live
        self._actions.extend(self.scheduler.spawned(child, process.pid, self._clock()))
        if child.group.boot:
            # If it can't be written, the child's exit tells why.
            self._put(live, child.group.boot)

    def _watch(self, live: RunningChild) -> None:
        process = live.process
        assert self._guardian is not None
        self._guardian.watch(process.pid)
        for descriptor, serve in (
            (process.stdout, self._on_stdout),
            (process.stderr, self._on_stderr),
            (process.pidfd, self._on_exit),
        ):
            if descriptor is not None:
                self._selector.register(descriptor, _READ, partial(self._guarded, serve, live))
        if process.pidfd is None:
            self._polled.add(live)

    def _watch_guardian(self) -> None:
        """Be told when the guardian ends, which it should not, where the system can tell."""
        if self._guardian_fd is not None:
            self._selector.unregister(self._guardian_fd)
            os.close(self._guardian_fd)
        self._guardian_fd = None if self._guardian is None else pidfd(self._guardian.pid)
        if self._guardian_fd is not None:
            self._selector.register(self._guardian_fd, _READ, self._on_guardian_exit)

    def _on_guardian_exit(self, mask: int) -> None:
        if self._guardian is not None:
            self._guardian.check()
        self._watch_guardian()

    def _environment(self, child: Child) -> dict[str, str]:
        assert self._guardian is not None
        settings = child.group.settings
        base = self._environ
        if settings.clean_env:
            base = {"PATH": base.get("PATH", os.defpath)}
        elif child.group.withheld:
            base = {name: base[name] for name in base.keys() - child.group.withheld}
        own = {MARK: self._guardian.mark, SLOT: str(child.slot.number)}
        if child.group.boot and child.slot.number == 0 and not child.group.came_up:
            own[FIRST] = "1"
        return {**base, **settings.env, **own}

    def _accept(self, action: actions.Accept) -> None:
        self._callbacks.append(
            partial(self._listener.accepted, action.job, action.child, action.now)
        )

    def _write(self, action: actions.Write) -> None:
        child, job = action.child, action.job
        live = self._live.get(child.number)
        # What stands in the pipe already can't be the answer to what was not asked yet.
        if live is None or not self._hear_first(live):
            return
        if job.request is None or job.child is not child or job.state is not JobState.RESERVED:
            # What it said has cost the child the job, or all.
            return
        process = live.process
        offset = process.written
        try:
            put = self._put(live, job.request)
        finally:
            if process.written > offset:
                self.scheduler.written(child, job, offset, self._clock())
        if not put:
            self._give_up_writing(live)

    def _hear_first(self, live: RunningChild) -> bool:
        """Take in what a child wrote before its next request; return whether it can have that."""
        process, child = live.process, live.child
        early: bytes | None = None
        if not process.is_silent():
            early = b"" if process.stdout is None else process.read(process.stdout)
            if early == b"":
                self._actions.extend(self.scheduler.stdout_closed(child, self._clock()))
                return False
        if not early and not live.has_open_line:
            # Most often.
            return True
        if child.may_speak:
            if early:
                self._feed(live, early)
            return True
        early = live.take_open_line() + (early or b"")
        reason = f"it wrote {quote(early)}, which nobody had asked for"
        self._actions.extend(self.scheduler.faulted(child, reason, self._clock()))
        return False

    def _give_up_writing(self, live: RunningChild) -> None:
        """A child has closed its stdin: hear it out, for that may be its answer."""
        process = live.process
        if process.stdout is not None:
            for data in process.read_rest(process.stdout):
                self._feed(live, data)
        self._actions.extend(
            self.scheduler.unwritten(
                live.child, "it closed its stdin", process.read_bytes(), self._clock()
            )
        )

    def _put(self, live: RunningChild, line: bytes) -> bool:
        """Write `line` to a child's stdin, the rest of it when there is room. As
        `ChildProcess.write`."""
        process = live.process
        if not process.write(line):
            return False
        if process.unwritten and not live.writing:
            assert process.stdin is not None
            live.writing = True
            self._selector.register(
                process.stdin, _WRITE, partial(self._guarded, self._on_stdin, live)
            )
        return True

    def _resolve(self, action: actions.Resolve) -> None:
        facts = None
        if action.child is not None and not isinstance(action.outcome, outcomes.Answered):
            live = self._live.get(action.child.number)
            facts = None if live is None else live.facts()
        self._callbacks.append(partial(self._listener.resolved, action.job, action.outcome, facts))

    def _finished(self, action: actions.Finished) -> None:
        self._callbacks.append(partial(self._listener.finished, action.job))

    def _soft_timeout(self, action: actions.SoftTimeout) -> None:
        live = self._live.get(action.child.number)
        told = action.child.cancels
        if action.signum is not None and live is not None:
            told = live.signal(action.signum)
        self._callbacks.append(partial(self._listener.soft_timed_out, action.job, told))

    def _cancel(self, action: actions.Cancel) -> None:
        live = self._live.get(action.child.number)
        if live is not None:
            # If it can't be written, the child's exit tells why.
            self._put(live, encode_cancel(action.job.task_id, action.reason))

    def _interrupt(self, action: actions.Interrupt) -> None:
        live = self._live.get(action.child.number)
        if live is not None and not live.signal(action.signum):
            # Out of our sight; what it was started under may pass it on.
            live.kill(action.signum)

    def _overruled(self, action: actions.Overruled) -> None:
        self._callbacks.append(partial(self._listener.overruled, action.job))

    def _progressed(self, action: actions.Progressed) -> None:
        self._callbacks.append(partial(self._listener.progressed, action.job, action.meta))

    def _logged(self, action: actions.Logged) -> None:
        live = self._live.get(action.child.number)
        if live is not None:
            live.log(action.record, action.job)

    def _probe(self, action: actions.Probe) -> None:
        live = self._live.get(action.child.number)
        if live is not None:
            read = live.process.read_bytes()
            self._actions.extend(self.scheduler.probed(live.child, read, self._clock()))

    def _measure(self, action: actions.Measure) -> None:
        memory = self.memory_of(action.child)
        self._actions.extend(self.scheduler.measured(action.child, memory, self._clock()))

    def _kill(self, action: actions.Kill) -> None:
        live = self._live.get(action.child.number)
        if live is None:
            return
        if action.signum == signal.SIGKILL:
            live.programs = self._programs_of(live)
        if not live.kill(action.signum) and action.signum == signal.SIGKILL:
            reason = reports.whose(live.process.pid)
            self._actions.extend(self.scheduler.unkillable(live.child, reason, self._clock()))

    @staticmethod
    def _programs_of(live: RunningChild) -> tuple[str, ...]:
        """Return what runs in the group of a child, beside the child, as text."""
        [rest] = programs.members([live.process.pid]).values()
        return programs.titles(pid for pid in rest if pid != live.pid)

    def _close_stdin(self, action: actions.CloseStdin) -> None:
        live = self._live.get(action.child.number)
        if live is not None:
            self._stop_writing(live)
            live.process.close_stdin()

    def _report(self, action: actions.Report) -> None:
        child = action.child
        live = self._live.get(child.number)
        facts = None if live is None else live.facts()
        if facts is not None and not child.proven:
            child.group.last_words = facts.stderr
        rest: tuple[str, ...] = ()
        if live is not None:
            rest = live.programs if live.programs is not None else self._programs_of(live)
        reports.replaced(action, facts, rest)
        self._tell(action)

    def _recycled(self, action: actions.Recycled) -> None:
        reports.recycled(action)
        self._tell(action)

    def _tell(self, change: Change) -> None:
        self._callbacks.append(partial(self._listener.child_changed, change))

    # -- descriptors

    def _guarded(
        self, serve: Callable[[RunningChild], None], live: RunningChild, mask: int
    ) -> None:
        """Serve one descriptor. A failure costs its child: the descriptor stays ready, and the
        engine would spin on it."""
        if live.gone:
            return
        try:
            serve(live)
        except Exception as exc:
            logger.exception("Serving the child with pid %s failed", live.process.pid)
            self._unregister(live)
            self._polled.add(live)
            self._actions.extend(
                self.scheduler.faulted(live.child, f"serving it failed: {exc!r}", self._clock())
            )

    def _on_stdin(self, live: RunningChild) -> None:
        if not live.process.write_more():
            self._give_up_writing(live)
        if not live.process.unwritten:
            self._stop_writing(live)

    def _on_stdout(self, live: RunningChild) -> None:
        if live.process.stdout is None:
            return
        data = live.process.read(live.process.stdout)
        if data:
            self._feed(live, data)
        elif data == b"":
            self._selector.unregister(live.process.stdout)
            live.process.stdout = None
            # Most often it is ending right now, and how says more than that it is silent.
            live.process.ends_within(EXIT_PATIENCE)
            if not self._reaped(live):
                self._actions.extend(self.scheduler.stdout_closed(live.child, self._clock()))

    def _feed(self, live: RunningChild, data: bytes) -> None:
        now = self._clock()
        try:
            for message in live.messages(data):
                self._actions.extend(self._hear(live, message, now))
        except ProtocolFault as exc:
            self._actions.extend(self.scheduler.faulted(live.child, str(exc), now))

    def _hear(
        self, live: RunningChild, message: Message | Ready | Fatal, now: float
    ) -> list[Action]:
        scheduler, child = self.scheduler, live.child
        if isinstance(message, Reply):
            return scheduler.replied(child, message, now)
        if isinstance(message, Progress):
            return scheduler.progressed(child, message, now)
        if isinstance(message, Log):
            return scheduler.logged(child, message, now)
        if isinstance(message, Fatal):
            return scheduler.boot_failed(child, message.message, now)
        live.ready = True
        if message.pid is not None:
            live.pid = live.process.member(message.pid)
            live.named = live.pid is not None
        return scheduler.ready(child, message, live.pid, now)

    def _on_stderr(self, live: RunningChild) -> None:
        if not live.read_stderr() and live.process.stderr is not None:
            self._selector.unregister(live.process.stderr)
            live.process.stderr = None

    def _on_exit(self, live: RunningChild) -> None:
        self._reaped(live)

    def _reaped(self, live: RunningChild) -> bool:
        """If the child has ended, hear it out, and let the scheduler know."""
        status = live.process.ended()
        if live.gone or status is None:
            return live.gone
        if live.process.stdout is not None:
            for data in live.process.read_rest(live.process.stdout):
                self._feed(live, data)
        live.end_stderr()
        process = live.process
        read = process.written if process.has_reader() else process.read_bytes()
        live.gone = True
        self._unregister(live)
        self._actions.extend(self.scheduler.exited(live.child, status, read, self._clock()))
        return True

    def _forget(self, action: actions.Forget) -> None:
        live = self._live.pop(action.child.number, None)
        if live is None:
            return
        process, child = live.process, action.child
        process.close()
        if action.leaves:
            process.leave()
            self._forget_group(process.pid)
            return
        [rest] = programs.members([process.pid]).values()
        if not child.reason and (titles := live.programs or programs.titles(rest)):
            # Nobody has told yet.
            reports.cleared(child, titles, self.scheduler.stopping)
        self._remains.end(process, rest, self._clock())

    def _forget_group(self, pid: int) -> None:
        if self._guardian is not None:
            self._guardian.forget(pid)

    def _stop_writing(self, live: RunningChild) -> None:
        if live.writing and live.process.stdin is not None:
            self._selector.unregister(live.process.stdin)
        live.writing = False

    def _unregister(self, live: RunningChild) -> None:
        self._stop_writing(live)
        self._polled.discard(live)
        for descriptor in (live.process.stdout, live.process.stderr, live.process.pidfd):
            if descriptor is not None and descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)


def _answer(answer: Future[_T], question: Callable[[], _T]) -> None:
    if not answer.set_running_or_notify_cancel():
        # Nobody waits for it any more.
        return
    try:
        answer.set_result(question())
    except Exception as exc:
        answer.set_exception(exc)
