"""Owns every process: starts children and the guardian, and ends them and what they have started.

A child that has exited is forgotten (`forget`). What it left running is ended before (`remains`).
When the worker ends, all children are killed (`kill_all`). A forked copy of the worker lets go of
all of them and touches none (`disown`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..core.model import Child, Group
from ..core.scheduler import Scheduler
from ..errors import SpawnError
from ..wire.environment import FIRST, SLOT
from . import programs, reports
from .descriptors import Descriptors
from .guardian import MARK, Guardian
from .loop import Loop
from .memory import MemoryMeter
from .process import KILL_GRACE, ChildProcess
from .remains import Remains
from .running import RunningChild
from .starting import Forked, Program, Streams, pidfd
from .templates import Templates

__all__ = ("Processes",)


class Processes:
    """The processes of all children that are not forgotten.

    Arguments:
        loop: watches the guardian, and looks after what children leave.
        scheduler: is told when a child's process runs, or can't.
        descriptors: serves the children.
        environ: the environment that children start from.
        owner: the worker's node name. The guardian shows it in its command line.
    """

    def __init__(
        self,
        loop: Loop,
        scheduler: Scheduler,
        descriptors: Descriptors,
        environ: Mapping[str, str],
        owner: str,
    ) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._descriptors = descriptors
        self._environ = dict(environ)
        self._owner = owner
        #: By the children's numbers.
        self._running: dict[int, RunningChild] = {}
        self._guardian: Guardian | None = None
        #: Readable once the guardian has ended; None where the system has no such descriptor.
        self._guardian_fd: int | None = None
        self._meter = MemoryMeter()
        self._remains = Remains(self._forget_group)
        self._templates = Templates(
            loop,
            self._environment,
            self._watch_over,
            self._forget_group,
            self._forked,
            self._failed,
            self._start_unfit,
        )

    def __iter__(self) -> Iterator[RunningChild]:
        """Yield all of them. They may be forgotten meanwhile."""
        yield from tuple(self._running.values())

    def get(self, child: Child) -> RunningChild | None:
        """Return the process of `child`; None if it was not started or is forgotten."""
        return self._running.get(child.number)

    def memory_of(self, child: Child) -> int:
        """Return the resident memory of `child` and of what it has started, in bytes; 0 if it is
        gone."""
        running = self.get(child)
        if running is None:
            return 0
        process = running.process
        return self._meter.measure(process.pid, self._loop.clock(), process.shares_memory)

    def template_of(self, group: str) -> dict[str, Any] | None:
        """Return facts of the template of `group`; None if there is none."""
        return self._templates.facts(group)

    # -- starting

    def start_guardian(self) -> None:
        """Start the guardian. It must run before the first child does."""
        self._guardian = Guardian(self._owner)
        self._watch_guardian()

    def spawn(self, child: Child) -> None:
        """Start the process of `child`, or have it forked, and serve its descriptors. The scheduler
        is told.

        Raises:
            SpawnError: the process can't be started.
            OSError: its descriptors can't be served. It has been killed.
        """
        if self._templates.can_fork(child.group):
            self._templates.fork(child)
        else:
            self._start(child)

    def _start(self, child: Child) -> None:
        assert self._guardian is not None
        settings = child.group.settings
        # A child that reads a boot line can also go on with the worker's own stderr.
        handover = settings.stderr == "inherit" and child.group.boot
        stderr = "handover" if handover else settings.stderr
        environ = self._environment(child.group, child.slot.number)
        streams = Streams(stderr)
        try:
            program = Program(settings.command, environ, settings.cwd, streams)
        except SpawnError:
            streams.close_ours()
            raise
        finally:
            streams.close_theirs()
        running = self._serve(child, ChildProcess(program, streams.ours))
        self._loop.tell(self._scheduler.spawned, child, program.pid)
        if child.group.boot:
            # If it can't be written, the child's exit tells why.
            self._descriptors.write(running, child.group.boot)

    def _start_unfit(self, child: Child) -> None:
        try:
            self._start(child)
        except (SpawnError, OSError) as exc:
            self._failed(child, str(exc))

    def _forked(self, child: Child, forked: Forked, streams: list[int]) -> None:
        try:
            self._serve(child, ChildProcess(forked, streams))
        except OSError as exc:
            self._failed(child, str(exc))
        else:
            self._loop.tell(self._scheduler.spawned, child, forked.pid)

    def _failed(self, child: Child, reason: str, details: str = "") -> None:
        self._loop.tell(partial(self._scheduler.spawn_failed, details=details), child, reason)

    def _serve(self, child: Child, process: ChildProcess) -> RunningChild:
        """Serve the descriptors of `process`, which is that of `child`.

        Raises:
            OSError: they can't be served. It has been killed.
        """
        running = RunningChild(child, process)
        try:
            self._watch_over(process.pid)
            self._descriptors.watch(running)
        except OSError:
            # There are no more descriptors, or the selector has no memory.
            process.kill(signal.SIGKILL)
            process.wait()
            self._descriptors.unwatch(running)
            process.close()
            raise
        self._running[child.number] = running
        return running

    def _watch_over(self, pid: int) -> None:
        if self._guardian is not None:
            self._guardian.watch(pid)

    def _environment(self, group: Group, slot: int = 0) -> dict[str, str]:
        assert self._guardian is not None
        base = self._environ
        if group.settings.clean_env:
            base = {"PATH": base.get("PATH", os.defpath)}
        elif group.withheld:
            base = {name: base[name] for name in base.keys() - group.withheld}
        own = {MARK: self._guardian.mark, SLOT: str(slot)}
        if group.boot and slot == 0 and not group.came_up:
            own[FIRST] = "1"
        return {**base, **group.settings.env, **own}

    # -- the guardian

    def _watch_guardian(self) -> None:
        """Watch for the end of the guardian, which should outlive all children."""
        if self._guardian_fd is not None:
            self._loop.selector.unwatch(self._guardian_fd)
            os.close(self._guardian_fd)
        self._guardian_fd = None if self._guardian is None else pidfd(self._guardian.pid)
        if self._guardian_fd is not None:
            self._loop.selector.watch(self._guardian_fd, self._on_guardian_exit)

    def _on_guardian_exit(self) -> None:
        if self._guardian is not None:
            self._guardian.check()
        self._watch_guardian()

    def _forget_group(self, pid: int) -> None:
        if self._guardian is not None:
            self._guardian.forget(pid)

    # -- ending

    def forget(self, child: Child, leaves: bool, stopping: bool) -> None:
        """Forget `child`, which has exited.

        Arguments:
            child: the child.
            leaves: whether what it has left running goes on; otherwise that is ended.
            stopping: whether the worker stops, for the log.
        """
        running = self._running.pop(child.number, None)
        if running is None:
            return
        process = running.process
        self._meter.forget(process.pid)
        process.close()
        if leaves:
            process.leave()
            self._forget_group(process.pid)
            return
        [rest] = programs.members([process.pid]).values()
        if not child.reason and (titles := running.programs or programs.titles(rest)):
            # With a reason, the log has named them in the report of the child's replacement.
            reports.cleared(child, titles, stopping)
        self._remains.end(process, rest, self._loop.clock())
        self._loop.chores.add(self._remains)

    def kill_all(self) -> None:
        """Kill every child and forget it, whatever state it is in.

        Safe in a signal handler: it relies on nothing that a turn may have left half done.
        """
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            self._report_leftovers(guardian)
        killed = {running for running in self if running.kill(signal.SIGKILL)}
        # They reap what they have forked, so they end after that.
        if guardian is not None:
            self._watch_guardian()
            # It ends what is left. Children are reaped only after that, see `remains`.
            guardian.close()
        self._reap_all(killed)
        self._remains.finish()
        self._templates.kill_all()

    def _reap_all(self, killed: set[RunningChild]) -> None:
        """Reap and forget all children. Wait only for those in `killed`, and not for ever."""
        end = self._loop.clock() + KILL_GRACE
        left = []
        for running in self:
            self._descriptors.unwatch(running)
            process = running.process
            process.kill(signal.SIGKILL)
            waits = running in killed and not running.child.unkillable
            if not process.wait(max(end - self._loop.clock(), 0.0) if waits else 0.0):
                left.append(process.pid)
            process.close()
            self._running.pop(running.child.number, None)
        if left:
            reports.left_behind(left)

    def _report_leftovers(self, guardian: Guardian) -> None:
        """Log which programs end with the worker, because children have left them running."""
        children = {pid for running in self for pid in (running.process.pid, running.pid)}
        children.update(self._templates.pids)
        # Not those that are killed with their child, and not those that the log has named before.
        groups = set(self._remains.groups)
        for running in self:
            if running.child.group.settings.leftovers == "kill":
                groups.add(running.process.pid)
        strays = [pid for pid in guardian.descendants() if pid not in children]
        for members in programs.members(groups).values() if strays else ():
            strays = [pid for pid in strays if pid not in members]
        if titles := programs.titles(strays):
            reports.left_over(titles)

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's descriptors, and touch no process."""
        for running in self:
            running.process.close()
        self._running.clear()
        self._templates.disown()
        self._remains.disown()
        if self._guardian is not None:
            self._guardian.disown()
            self._guardian = None
        if self._guardian_fd is not None:
            os.close(self._guardian_fd)
            self._guardian_fd = None
