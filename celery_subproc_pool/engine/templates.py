"""Templates: processes that have loaded the project, and fork children when they are asked.

There is one for each first line that children read (`Group.boot`). When that line changes, the next
child starts another template. The old one goes with its last child. A template that can't be used
fails the children that wait for it, as a program that can't be started does.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from ..core.model import Child, Group
from .loop import Loop
from .process import KILL_GRACE
from .starting import Forked, Streams, pidfd
from .template import READ_BYTES, Template, start_template

__all__ = ("Templates",)

logger = logging.getLogger("celery_subproc_pool")

#: Seconds until a template is asked again to reap.
REAP_INTERVAL = 0.05

#: Seconds that a template may take to fork one child.
FORK_PATIENCE = 10.0


class Templates:
    """All templates. It is a `loop.Chore`, because a template must be ready in time.

    Arguments:
        loop: watches their descriptors.
        environment: returns the environment of a group's processes.
        started: is called with the pid of each template that starts.
        gone: is called with the pid of each template that is gone.
        on_forked: is called with a child, its process, and our ends of its pipes.
        on_failed: is called with a child that could not be forked, why, and with details.
        on_unfit: is called with a child that can't be forked: it is to be started as a program.
    """

    def __init__(
        self,
        loop: Loop,
        environment: Callable[[Group], Mapping[str, str]],
        started: Callable[[int], None],
        gone: Callable[[int], None],
        on_forked: Callable[[Child, Forked, list[int]], None],
        on_failed: Callable[[Child, str, str], None],
        on_unfit: Callable[[Child], None],
    ) -> None:
        self._loop = loop
        self._environment = environment
        self._started = started
        self._gone = gone
        self._on_forked = on_forked
        self._on_failed = on_failed
        self._on_unfit = on_unfit
        self._all: list[Template] = []
        #: By group: the one that forks now.
        self._current: dict[str, Template] = {}
        #: By group: the first line of which it is known that it can't be forked.
        self._unfit: dict[str, bytes] = {}

    # -- asking

    def can_fork(self, group: Group) -> bool:
        """Return whether children of `group` are forked, as far as is known by now."""
        return group.forks and self._unfit.get(group.name) is not group.boot

    def fork(self, child: Child) -> None:
        """Have `child` forked. What comes of it is told later.

        Raises:
            SpawnError: its template can't be started.
            OSError: there are no more descriptors.
        """
        template = self._current.get(child.group.name)
        if template is None or template.is_gone or template.boot is not child.group.boot:
            template = self._start(child.group)
        template.awaited[child.number] = (child, None)
        self._order_next(template)

    def _order_next(self, template: Template) -> None:
        """Ask `template` for the next child, if it has forked the last one: the socket takes few
        orders at a time."""
        while template.is_ready and template.asked is None:
            waiting = [child for child, streams in template.awaited.values() if streams is None]
            if not waiting:
                break
            self._order(template, waiting[0])
        asked = template.asked is not None
        template.deadline = self._loop.clock() + FORK_PATIENCE if asked else template.boot_deadline
        if asked:
            self._loop.chores.add(self)

    def _order(self, template: Template, child: Child) -> None:
        settings = child.group.settings
        stderr = "handover" if settings.stderr == "inherit" else settings.stderr
        try:
            streams = Streams(stderr)
        except OSError as exc:
            self._abort(template, child.number, str(exc))
            return
        template.awaited[child.number] = (child, streams)
        try:
            template.order(child, streams)
        except OSError as exc:
            self._abort(template, child.number, f"its template can't be asked: {exc}")
        else:
            template.asked = (child.number, self._loop.clock())
        finally:
            streams.close_theirs()

    def _reap(self, template: Template, pid: int) -> None:
        template.children.discard(pid)
        template.to_reap.append(pid)
        self._order_reaping(template)
        self._dismiss_old()

    def _order_reaping(self, template: Template) -> None:
        """Have the children reaped that have ended; later, if the socket is full."""
        if not template.is_gone and not template.order_reaping():
            self._loop.chores.add(self)

    # -- starting and ending

    def _start(self, group: Group) -> Template:
        template = start_template(group, self._environment(group))
        self._started(template.pid)
        self._all.append(template)
        self._current[group.name] = template
        template.boot_deadline = self._loop.clock() + group.settings.start_timeout
        template.deadline = template.boot_deadline
        self._loop.chores.add(self)
        self._loop.selector.watch(template.stdout, lambda: self._on_readable(template))
        if template.stderr is not None:
            self._loop.selector.watch(template.stderr, lambda: self._on_stderr(template))
        self._write_boot(template)
        self._dismiss_old()
        return template

    def _write_boot(self, template: Template) -> None:
        template.write_boot()
        write = self._loop.selector
        if template.rest:
            write.watch(template.stdin, lambda: self._write_boot(template), writable=True)
        else:
            write.unwatch(template.stdin)

    def _dismiss_old(self) -> None:
        """Let templates end that fork no more and have no children."""
        for template in tuple(self._all):
            current = self._current.get(template.group.name)
            old = current is not None and current is not template and current.is_ready
            if old and not template.children and not template.awaited:
                self._end(template)

    def _end(self, template: Template) -> None:
        """Forget a template, which has ended or is to end: it does when its socket is closed."""
        if template not in self._all:
            return
        self._all.remove(template)
        if self._current.get(template.group.name) is template:
            del self._current[template.group.name]
        for descriptor in template.descriptors:
            self._loop.selector.unwatch(descriptor)
        template.is_gone = True
        template.close()
        if template.program.pidfd is not None:
            os.close(template.program.pidfd)
        template.program.kill(signal.SIGKILL, _send_if_there)
        template.program.wait(KILL_GRACE)
        self._gone(template.pid)

    def kill_all(self) -> None:
        """End all templates."""
        for template in tuple(self._all):
            template.awaited.clear()
            self._end(template)

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's descriptors."""
        for template in self._all:
            template.close()
        self._all.clear()
        self._current.clear()

    # -- hearing

    def _on_readable(self, template: Template) -> None:
        try:
            data = os.read(template.stdout, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        for line in template.lines.feed(data):
            if not template.is_gone:
                self._hear(template, json.loads(line))
        if not data and not template.is_gone:
            template.read_words()
            self._lose(template, template.why_it_ended())

    def _on_stderr(self, template: Template) -> None:
        if not template.read_words():
            self._loop.selector.unwatch(template.stderr)

    def _hear(self, template: Template, said: dict[str, Any]) -> None:
        status = said.get("status")
        if status == "ready":
            template.is_ready = True
            template.boot_deadline = None
            self._dismiss_old()
            self._order_next(template)
        elif status == "forked":
            self._take(template, said["child"], said["pid"])
        elif status == "failed":
            template.asked = None
            self._abort(template, said["child"], f"it can't be forked: {said['reason']}")
            self._order_next(template)
        elif status == "unfit":
            self._give_up_forking(template, said["reason"])
        elif status == "fatal":
            template.read_words()
            summary = said["message"].partition("\n")[0]
            self._lose(template, f"it can't boot: {summary}", said["message"])

    def _take(self, template: Template, number: int, pid: int) -> None:
        child, streams = template.awaited.pop(number)
        assert streams is not None
        assert template.asked is not None
        template.forks += 1
        template.seconds += self._loop.clock() - template.asked[1]
        template.asked = None
        self._order_next(template)
        descriptor = pidfd(pid)
        template.children.add(pid)
        if descriptor is None:
            streams.close_ours()
            self._on_failed(child, "the system gives no pidfd for it", "")
            return
        process = Forked(pid, descriptor, lambda gone: self._reap(template, gone))
        self._on_forked(child, process, streams.ours)

    def _abort(self, template: Template, number: int, reason: str, details: str = "") -> None:
        child, streams = template.awaited.pop(number)
        if streams is not None:
            streams.close_ours()
        self._on_failed(child, reason, details)

    def _give_up_forking(self, template: Template, reason: str) -> None:
        logger.warning(
            "The children of %s are not forked, because %s. Each loads the project by itself, which"
            " takes more time and memory (start in docs/settings.md)",
            template.group.name,
            reason,
        )
        self._unfit[template.group.name] = template.boot
        children = [child for child, _ in template.awaited.values()]
        template.awaited.clear()
        self._end(template)
        for child in children:
            self._on_unfit(child)

    def _lose(self, template: Template, reason: str, details: str = "") -> None:
        """Take in that `template` forks no more, for `reason`. Its children go on."""
        waiting = tuple(template.awaited)
        if template.is_ready:
            logger.warning(
                "The template of %s (pid %s) has died: its %d children go on, and the next one"
                " starts another template",
                template.group.name,
                template.pid,
                len(template.children),
            )
        self._end(template)
        older = self._older(template.group)
        for number in waiting:
            child, streams = template.awaited[number]
            if older is not None and child.slot.child is child and streams is None:
                # It is no successor: the slot is empty without it.
                del template.awaited[number]
                older.awaited[number] = (child, None)
                self._order_next(older)
            else:
                self._abort(template, number, reason, details)

    def _older(self, group: Group) -> Template | None:
        """Return the latest template of `group` that forks, if the current one has failed."""
        usable = [each for each in self._all if each.group is group and each.is_ready]
        return usable[-1] if usable else None

    # -- time

    @property
    def deadline(self) -> float | None:
        """When a template must be ready, or have forked, or is to be asked again to reap; None if
        there is no such time."""
        due = [each.deadline for each in self._all if each.deadline is not None]
        if any(template.to_reap for template in self._all):
            due.append(self._loop.clock() + REAP_INTERVAL)
        return min(due, default=None)

    def look(self, now: float) -> None:
        """End templates that are not ready in time, or do not fork."""
        for template in tuple(self._all):
            self._order_reaping(template)
            if template.deadline is not None and now >= template.deadline:
                seconds = template.group.settings.start_timeout
                reason = f"it was not ready within {seconds:g} s (start_timeout)"
                reason += template.last_words
                if template.is_ready:
                    reason = f"its template did not fork it within {FORK_PATIENCE:g} s"
                self._lose(template, reason)

    def facts(self, group: str) -> dict[str, Any] | None:
        """Return what `inspect stats` says of the template of `group`; None if there is none."""
        template = self._current.get(group)
        if template is None:
            return None
        return {
            "pid": template.pid,
            "ready": template.is_ready,
            "children": len(template.children),
            "forks": template.forks,
            "fork": round(template.seconds / template.forks, 6) if template.forks else None,
        }

    @property
    def pids(self) -> list[int]:
        """The pids of all templates."""
        return [template.pid for template in self._all]


def _send_if_there(pid: int, signum: int) -> None:
    try:
        os.killpg(pid, signum)
    except OSError:
        # It has ended.
        return
