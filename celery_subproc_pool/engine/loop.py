"""The engine's loop: the turn, the inbox, and the order in which things happen.

    other threads ---- post ---> inbox --+
                                         v
    descriptors ---> selector ---> scheduler (decides) ---> actions ---> perform
                                         ^                                 |  |
                                         +------------- tell --------------+  |
                                                              callbacks <-----+

A turn tells the scheduler everything that has happened. Then it lets the scheduler hand out jobs,
performs all actions, and repeats this until nothing is left to do. Callbacks run last, one at a
time, because a callback may call the loop again: Celery calls `post` from inside of one. What was
put off until then (`at_rest`) is done when no callback is left.

One thread turns the loop. It is the thread of the worker's event loop, which sees one descriptor
(`fileno`) and one timer (`on_deadline`), or a thread that does nothing else. A signal handler may
interrupt a turn on the same thread: it leaves its event in the inbox, and the turn handles it.

The loop knows no process: `perform` is handed in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Protocol, TypeVar

from ..core.actions import Action
from ..core.model import Child
from ..errors import SpawnError
from .selector import Selector

__all__ = ("Chore", "Decider", "Event", "Loop")

logger = logging.getLogger("celery_subproc_pool")

_T = TypeVar("_T")

#: A method of the scheduler. Its last argument is the time at which the event happened.
Event = Callable[..., list[Action]]


class Decider(Protocol):
    """What the loop itself needs of the scheduler."""

    @property
    def next_deadline(self) -> float | None:
        """The time of the next `tick`; None if nothing is due."""

    def tick(self, now: float) -> list[Action]:
        """Decide what is due."""

    def dispatch(self, now: float) -> list[Action]:
        """Hand out jobs: all events that are known have been told."""

    def faulted(self, child: Child, reason: str, now: float) -> list[Action]:
        """Give up `child`: an action on it has failed."""


class Chore(Protocol):
    """Something to look at from time to time, because no descriptor tells of it."""

    @property
    def deadline(self) -> float | None:
        """The time of the next look; None if there is nothing to look at any more."""

    def look(self, now: float) -> None:
        """Look. Called in each turn, also before the deadline."""


class Loop:
    """Turns events into actions. See this module's docstring.

    Arguments:
        scheduler: decides.
        perform: by the type of an action: what performs it, on the thread that turns the loop.
        on_failure: called once, with the error after which the loop does nothing any more.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        scheduler: Decider,
        perform: Mapping[type, Callable[[Any], None]],
        on_failure: Callable[[Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        #: Where descriptors are registered, to be served in each turn.
        self.selector = Selector()
        #: What is looked at in each turn beside the descriptors, until it has no deadline any more.
        #: Usually there is none.
        self.chores: set[Chore] = set()
        #: Called with the monotonic time before which the loop must be turned again.
        self.on_deadline: Callable[[float], None] = lambda deadline: None
        #: Whether the scheduler or the loop itself has raised. Their state may be wrong since
        #: then, so the loop does nothing any more.
        self.failed = False
        self._scheduler = scheduler
        self._perform = perform
        self._on_failure = on_failure
        self._inbox: deque[tuple[Event, tuple[Any, ...]]] = deque()
        self._actions: deque[Action] = deque()
        self._callbacks: deque[Callable[[], None]] = deque()
        #: Has a callback called later in this turn, after all actions.
        self.call_later: Callable[[Callable[[], None]], None] = self._callbacks.append
        self._put_off: deque[Callable[[], None]] = deque()
        #: Has a function called at the end of this turn, after all callbacks.
        self.at_rest: Callable[[Callable[[], None]], None] = self._put_off.append
        #: Whether the scheduler was told an event since its last `dispatch`.
        self._told = False
        self._turning = False
        self._closed = False
        self._announced: float | None = None
        self._thread = threading.get_ident()

    # -- from any thread

    def post(self, event: Event, *arguments: Any) -> None:
        """Tell the scheduler of an event, from any thread.

        On the loop's own thread, the event takes effect before this returns. If the loop is being
        turned at the moment, it takes effect later in that turn.

        Arguments:
            event: a method of the scheduler that takes the time as its last argument.
            arguments: the other arguments of `event`.
        """
        self._inbox.append((event, arguments))
        self._attend()

    def call(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the thread that turns the loop, from any thread."""
        self.call_later(callback)
        self._attend()

    def ask(self, question: Callable[[], _T], patience: float) -> _T:
        """Return what `question` returns, or raise what it raises, from any thread.

        It is called on the thread that turns the loop: what it looks at does not change meanwhile.
        If that thread hangs or has ended, it is called on the calling thread.

        Arguments:
            question: looks, and changes nothing.
            patience: seconds to wait for the loop, which may be in the midst of a turn.
        """
        if self.on_own_thread or self.failed or self._closed:
            return question()
        answer: Future[_T] = Future()
        self.call(partial(_answer, answer, question))
        wait([answer], patience)
        return question() if answer.cancel() else answer.result()

    def wake(self) -> None:
        """Make a `turn` that waits return, from any thread. Once closed, do nothing: the thread may
        outlive the worker's pool."""
        self.selector.wake()

    @property
    def on_own_thread(self) -> bool:
        """Whether the calling thread is the one that turns the loop."""
        return threading.get_ident() == self._thread

    @property
    def turning(self) -> bool:
        """Whether the loop is being turned. On its own thread, the caller then is a callback, or
        a signal handler that interrupts a turn."""
        return self._turning

    def _attend(self) -> None:
        """Have the inbox and the callbacks looked at."""
        if threading.get_ident() != self._thread:
            self.wake()
        elif not self._turning:
            self._run_until_idle()

    # -- for the thread that turns it

    def fileno(self) -> int:
        """Return the descriptor that is readable when `turn` has something to do."""
        return self.selector.fileno()

    def wait_time(self, longest: float) -> float:
        """Return how many seconds `turn` may wait, at most `longest`."""
        deadline = self._deadline()
        return longest if deadline is None else min(max(deadline - self.clock(), 0.0), longest)

    def turn_at_deadline(self) -> None:
        """Turn, and announce the next deadline even if it has not changed."""
        self._announced = None
        self.turn()

    def close(self) -> None:
        """Give back the selector."""
        self._closed = True
        self.selector.close()

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's descriptors."""
        self._closed = True
        self.selector.disown()

    # -- for the parts that perform actions and serve descriptors

    def tell(self, event: Event, *arguments: Any) -> None:
        """Tell the scheduler of an event now, and have what it decides performed in this turn."""
        self._told = True
        self._actions.extend(event(*arguments, self.clock()))

    def note(self, event: Callable[..., object], *arguments: Any) -> None:
        """As `tell`, for an event from which no action follows."""
        self._told = True
        event(*arguments, self.clock())

    # -- the turn

    def begin(self, first: Event) -> None:
        """Make the calling thread the loop's own, and tell the `first` event.

        Raises:
            SpawnError: `perform` has raised it.
        """
        self._thread = threading.get_ident()
        self.tell(first)
        self._run_until_idle()

    def turn(self, timeout: float = 0.0) -> None:
        """Serve all descriptors that are ready, then run until idle.

        Arguments:
            timeout: seconds to wait for a descriptor to become ready.
        """
        if self._turning or self._closed or self.failed:
            return
        self._thread = threading.get_ident()
        self._turning = True
        try:
            self.selector.serve(timeout)
            if self.chores:
                _do(self.chores, self.clock)
            # After the descriptors: a reply that came in time is not late because we are.
            self.tell(self._scheduler.tick)
        except Exception as exc:
            self._fail(exc)
        finally:
            self._turning = False
        self._run_until_idle()

    def _run_until_idle(self) -> None:
        """Run until there is nothing left to do, and announce the next deadline."""
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
            # A signal handler may have posted after the last look: it saw the turn go on.
            if not self._inbox and not self._callbacks:
                break
        if not self.failed:
            self._announce()

    def _run_to_rest(self) -> None:
        """Tell all events, hand out jobs, perform all actions. Call one callback only if there was
        no action, and do what was put off only if there was no callback. Repeat."""
        inbox, actions, callbacks = self._inbox, self._actions, self._callbacks
        while True:
            while inbox:
                event, arguments = inbox.popleft()
                self._told = True
                actions.extend(event(*arguments, self.clock()))
            if self._told:
                self._told = False
                actions.extend(self._scheduler.dispatch(self.clock()))
            if actions:
                while actions:
                    self._act(actions.popleft())
            elif callbacks:
                self._call_back(callbacks.popleft())
            elif self._put_off:
                self._call_back(self._put_off.popleft())
            else:
                return

    def _act(self, action: Action) -> None:
        """Perform `action`. If that fails, its child is given up and the loop goes on."""
        try:
            self._perform[type(action)](action)
        except SpawnError:
            raise
        except Exception as exc:
            name = type(action).__name__
            logger.exception("%s failed", name)
            child: Child | None = getattr(action, "child", None)
            if child is not None:
                self.tell(self._scheduler.faulted, child, f"{name} failed: {exc!r}")

    def _call_back(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("A callback failed; the pool goes on")

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self._on_failure(error)

    def _announce(self) -> None:
        deadline = self._deadline()
        if deadline is not None and deadline != self._announced:
            self._announced = deadline
            self.on_deadline(deadline)

    def _deadline(self) -> float | None:
        soonest = self._scheduler.next_deadline
        for chore in self.chores:
            due = chore.deadline
            if due is not None and (soonest is None or due < soonest):
                soonest = due
        return soonest


def _do(chores: set[Chore], clock: Callable[[], float]) -> None:
    """Look at all `chores`. Drop those that have no deadline any more."""
    for chore in tuple(chores):
        chore.look(clock())
        if chore.deadline is None:
            chores.discard(chore)


def _answer(answer: Future[_T], question: Callable[[], _T]) -> None:
    if not answer.set_running_or_notify_cancel():
        # The asking thread has stopped waiting.
        return
    try:
        answer.set_result(question())
    except Exception as exc:
        answer.set_exception(exc)
