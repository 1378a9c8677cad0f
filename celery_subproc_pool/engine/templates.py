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
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..core.model import Child, Group
from ..errors import SpawnError
from ..wire.environment import TEMPLATE
from .loop import Loop
from .process import KILL_GRACE
from .starting import Forked, Program, Streams, pidfd
from .template import Template

__all__ = ("Templates",)

logger = logging.getLogger("celery_subproc_pool")

#: Bytes that are read at a time.
READ_BYTES = 1 << 16

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
        if template.is_ready:
            self._order(template, child)

    def _order(self, template: Template, child: Child) -> None:
        settings = child.group.settings
        stderr = "handover" if settings.stderr == "inherit" else settings.stderr
        try:
            streams = Streams(stderr)
        except OSError as exc:
            self._fail(template, child, str(exc))
            return
        order = {
            "child": child.number,
            "slot": child.slot.number,
            "handed_over": list(streams.handed_over),
        }
        descriptors = [*streams.theirs, *streams.handed_over.values()]
        try:
            socket.send_fds(template.orders, [json.dumps(order).encode()], descriptors)
        except OSError as exc:
            streams.close_ours()
            self._fail(template, child, f"its template can't be asked: {exc}")
        else:
            template.awaited[child.number] = (child, streams)
            template.asked_at[child.number] = self._loop.clock()
            self._expect(template)
        finally:
            streams.close_theirs()

    def _expect(self, template: Template) -> None:
        """Expect that `template` forks soon, if it has anything to fork."""
        asked = any(streams is not None for _, streams in template.awaited.values())
        template.deadline = self._loop.clock() + FORK_PATIENCE if asked else None
        if asked:
            self._loop.chores.add(self)

    def _fail(self, template: Template, child: Child, reason: str) -> None:
        template.awaited.pop(child.number, None)
        self._on_failed(child, reason, "")

    def _reap(self, template: Template, pid: int) -> None:
        template.children.discard(pid)
        if not template.is_gone:
            try:
                template.orders.send(json.dumps({"reap": pid}).encode())
            except OSError:
                # It is about to be gone, or does not read. It reaps when it has read.
                logger.debug("The template %s can't be asked to reap %s", template.pid, pid)
        self._dismiss_old()

    # -- starting and ending

    def _start(self, group: Group) -> Template:
        settings = group.settings
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        streams = Streams("null" if settings.stderr == "null" else "log")
        try:
            environ = {**self._environment(group), TEMPLATE: str(theirs.fileno())}
            program = Program(settings.command, environ, settings.cwd, streams, [theirs.fileno()])
        except SpawnError:
            streams.close_ours()
            ours.close()
            raise
        finally:
            streams.close_theirs()
            theirs.close()
        template = Template(group, program, ours, streams.ours)
        for descriptor in streams.ours:
            os.set_blocking(descriptor, False)
        # A template that hangs must not hang the worker.
        ours.setblocking(False)
        self._started(program.pid)
        self._all.append(template)
        self._current[group.name] = template
        template.deadline = self._loop.clock() + settings.start_timeout
        self._loop.chores.add(self)
        self._loop.selector.watch(template.stdout, lambda: self._on_readable(template))
        if template.stderr is not None:
            self._loop.selector.watch(template.stderr, lambda: self._on_stderr(template))
        self._write_boot(template)
        self._dismiss_old()
        return template

    def _write_boot(self, template: Template) -> None:
        try:
            template.rest = template.rest[os.write(template.stdin, template.rest) :]
        except BlockingIOError:
            pass
        except OSError:
            # Its end tells why.
            template.rest = template.rest[:0]
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
            self._read_last_words(template)
            self._lose(template, template.why_it_ended())

    def _on_stderr(self, template: Template) -> None:
        assert template.stderr is not None
        try:
            data = os.read(template.stderr, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        lines = template.words.feed(data)
        if template.group.settings.stderr == "inherit":
            with suppress(OSError):
                os.write(2, data)
        else:
            name = template.group.name
            for line in lines:
                logging.getLogger(f"celery_subproc_pool.child.{name}").info(
                    "[%s template pid %d] %s", name, template.pid, line
                )
        if not data:
            self._loop.selector.unwatch(template.stderr)

    def _hear(self, template: Template, said: dict[str, Any]) -> None:
        status = said.get("status")
        if status == "ready":
            template.is_ready = True
            template.deadline = None
            self._dismiss_old()
            for child, _ in tuple(template.awaited.values()):
                self._order(template, child)
        elif status == "forked":
            self._take(template, said["child"], said["pid"])
        elif status == "failed":
            self._expect(template)
            self._abort(template, said["child"], f"it can't be forked: {said['reason']}")
        elif status == "unfit":
            self._give_up_forking(template, said["reason"])
        elif status == "fatal":
            self._read_last_words(template)
            summary = said["message"].partition("\n")[0]
            self._lose(template, f"it can't boot: {summary}", said["message"])

    def _take(self, template: Template, number: int, pid: int) -> None:
        child, streams = template.awaited.pop(number)
        assert streams is not None
        self._expect(template)
        template.forks += 1
        template.seconds += self._loop.clock() - template.asked_at.pop(number)
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

    def _read_last_words(self, template: Template) -> None:
        if template.stderr is not None:
            self._on_stderr(template)

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
                self._order(older, child)
            else:
                self._abort(template, number, reason, details)

    def _older(self, group: Group) -> Template | None:
        """Return the latest template of `group` that forks, if the current one has failed."""
        usable = [each for each in self._all if each.group is group and each.is_ready]
        return usable[-1] if usable else None

    # -- time

    @property
    def deadline(self) -> float | None:
        """When a template must be ready; None if all are."""
        due = [each.deadline for each in self._all if each.deadline is not None]
        return min(due, default=None)

    def look(self, now: float) -> None:
        """End templates that are not ready in time."""
        for template in tuple(self._all):
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
