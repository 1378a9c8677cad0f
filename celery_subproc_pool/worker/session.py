"""One run of the pool, from its start to its end: the engine, its driver, its jobs.

Here are the pool's commands to the engine that are not about a job.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery.utils.log import get_logger
from celery.worker import state

from ..core import stats
from ..errors import ConfigError
from ..settings import TRACERS
from .drivers import HubDriver, ThreadDriver, wait_for_children
from .runner import Runner

__all__ = ("Session", "start_children")

logger = get_logger(__name__)

#: Seconds that a cold shutdown waits for tracers that store results.
STORE_GRACE = 5.0

#: Seconds that a remote control command waits for the engine. Its sender waits longer: a second, if
#: not told otherwise.
ANSWER_PATIENCE = 0.5


def start_children(runner: Runner) -> None:
    """Spawn the children of `runner`, and wait until they are up. No driver turns its engine yet.

    Raises:
        SpawnError: no child of a group came up.
        celery.exceptions.WorkerShutdown or WorkerTerminate: the worker is to stop.
    """
    try:
        runner.engine.start()
        wait_for_children(runner.engine)
    except BaseException:
        runner.close()
        raise


class Session:
    """Drains and ends an engine, has its children replaced, and asks it for facts.

    Arguments:
        runner: has the engine.
        threaded: whether a thread turns the engine; otherwise the worker's event loop.
    """

    def __init__(self, runner: Runner, threaded: bool) -> None:
        self.runner = runner
        self.engine = engine = runner.engine
        self.driver = ThreadDriver(engine) if threaded else HubDriver(engine)
        self.slots = runner.slots
        #: In a cold shutdown: the monotonic time until which results may be stored.
        self._store_until: float | None = None
        self.driver.start()

    def drain(self) -> None:
        """Wait until the jobs have ended, then the children; not if the engine has failed."""
        if not self.engine.failed:
            self.driver.drain(self._has_unfinished_jobs)

    def end(self) -> None:
        """Kill the children that are left, and give back all resources."""
        self.driver.halt()
        self.runner.close()

    def restart(self, name: str | None, new_boot: Callable[[str], bytes]) -> list[str]:
        """Replace the children of the group `name`, or of all groups; return the groups' names.

        Arguments:
            name: the group's; None for all groups.
            new_boot: makes the first line for the next children of a group that reads one.

        Raises:
            ConfigError: there is no such group; or as `new_boot`.
        """
        engine, scheduler = self.engine, self.engine.scheduler
        groups = scheduler.groups
        if name is not None and name not in groups:
            raise ConfigError(
                f"expected one of this worker's groups ({', '.join(groups)}), got {name!r}"
            )
        chosen = list(groups) if name is None else [name]
        boots = {each: new_boot(each) for each in chosen if groups[each].boot}
        for each, boot in boots.items():
            engine.post(scheduler.change_boot, each, boot)
        logger.info("Restarting the children of %s", ", ".join(chosen))
        engine.post(scheduler.restart, [groups[each] for each in chosen])
        return chosen

    def _has_unfinished_jobs(self) -> bool:
        """Return whether a shutdown has jobs to wait for.

        A cold shutdown has cancelled all jobs, also if it came during a warm one. It only waits
        for results that are being stored, and not for long: the backend may hang.
        """
        if self.engine.failed:
            return False
        if state.should_terminate and self._store_until is None:
            self._store_until = time.monotonic() + STORE_GRACE
        in_time = self._store_until is None or time.monotonic() < self._store_until
        return bool(self.slots.jobs) and in_time

    def numbers(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what was written, as `stats.writes`, and the numbers of each group."""
        engine, groups = self.engine, self.engine.scheduler.groups

        def look() -> tuple[dict[str, Any], dict[str, Any]]:
            # An external job that is traced counts once.
            others = [group for name, group in groups.items() if name != TRACERS]
            written = stats.writes(others, engine.writing)
            facts = {name: stats.group_facts(group) for name, group in groups.items()}
            for name in groups:
                facts[name]["template"] = engine.template_of(name)
            return written, facts

        return engine.ask(look, ANSWER_PATIENCE)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each child, as `stats.rows`."""
        engine = self.engine
        groups = engine.scheduler.groups.values()
        return engine.ask(
            lambda: stats.rows(groups, time.monotonic(), engine.memory_of), ANSWER_PATIENCE
        )
