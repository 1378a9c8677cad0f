"""The pool's settings: what each is called, its type, its default and its meaning. Frozen.

To add a setting:

1. Add a field here, with its default and a comment that says what it means and its unit. Use
   `CommonSettings` for all groups, `ChildSettings` for external children, `PythonSettings` for
   Python children. (`PythonSettings.as_child` makes a `ChildSettings` of the latter.)
2. If the field's type can't express what is allowed, add a check to `config`.
3. Add a row to the table in docs/settings.md. A test compares the fields with that table.
4. Use it where it takes effect: `child.group.settings` in `core` (decisions) and in
   `engine/processes.py: spawn` (how a process is started).
"""

from __future__ import annotations

import shlex
from fnmatch import fnmatchcase
from typing import Annotated

import msgspec

__all__ = (
    "ASYNCIO",
    "BOOTSTEPS",
    "CELERY_PREFIX",
    "ENVIRONMENT_VARIABLE",
    "LEFTOVERS_CHOICES",
    "PYTHON",
    "REPLAYABLE",
    "ROOT",
    "START_CHOICES",
    "STDERR_CHOICES",
    "TRACERS",
    "UNBOUNDED",
    "AsyncioSettings",
    "ChildSettings",
    "CommonSettings",
    "PoolSettings",
    "PythonSettings",
    "TracerSettings",
    "split_words",
    "with_limits",
)

#: The name of the setting in Celery's configuration. Paths in error messages begin with it.
ROOT = "subproc_pool"

#: The environment variable that holds the settings as JSON. It replaces the whole mapping.
ENVIRONMENT_VARIABLE = "CELERY_SUBPROC_POOL"

#: The names of Celery's own tasks begin with this. A pattern matches them only if it begins with
#: this too. Those that no group takes run in Python children, or in a tracer if there are none.
CELERY_PREFIX = "celery."

#: The name of the group of Python children.
PYTHON = "python"

#: The name of the group of asyncio children.
ASYNCIO = "asyncio"

#: The name of the group of tracers.
TRACERS = "tracers"

#: The values of `stderr`.
STDERR_CHOICES = ("log", "inherit", "null")

#: The values of `start`.
START_CHOICES = ("auto", "fork", "spawn")

#: The values of `leftovers`.
LEFTOVERS_CHOICES = ("keep", "kill")

#: The word in `replay` for the worker's bootsteps.
BOOTSTEPS = "bootsteps"

#: The values of `replay`, in the order in which the worker does them: names of signals, and the
#: construction of bootsteps.
REPLAYABLE = (
    "user_preload_options",
    "celeryd_init",
    "worker_init",
    BOOTSTEPS,
    "celeryd_after_setup",
)

#: More jobs than a worker has at a time.
UNBOUNDED = 1_000_000

#: A hundred years in seconds. More is a mistake, and overflows clocks.
_MAX_SECONDS = 100 * 365 * 86400.0

#: Seconds, not 0.
Positive = Annotated[float, msgspec.Meta(gt=0, le=_MAX_SECONDS)]
#: Seconds, 0 included.
NotNegativeSeconds = Annotated[float, msgspec.Meta(ge=0, le=_MAX_SECONDS)]
Count = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class CommonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings that all groups have."""

    #: Variables added to the child's environment.
    env: dict[str, str] = {}
    #: Working directory. None: the worker's.
    cwd: str | None = None
    #: Number of children. None: as many as the worker's concurrency needs.
    size: Count | None = None
    #: Seconds that a child may take to boot. With a handshake, the boot ends when the child is
    #: ready. Without one, it ends when the child reads its first job; this is checked only when the
    #: time limit of that job is over.
    start_timeout: Positive = 60.0
    #: Seconds between closing stdin, SIGTERM and SIGKILL when a child is stopped.
    stop_timeout: Positive = 10.0
    #: Seconds between SIGTERM and SIGKILL when a job runs past its hard limit. 0: SIGKILL at once.
    kill_grace: NotNegativeSeconds = 0.0
    #: Where the child's stderr goes: "log" is the worker's log, "inherit" the worker's stderr,
    #: "null" nowhere.
    stderr: str = "log"
    #: What happens to programs that a child started and left running when it is recycled or
    #: stopped: "keep" lets them run until the worker ends, "kill" ends them.
    leftovers: str = "kill"
    #: Jobs that a child gets before another takes its place. None: no limit, or
    #: ``--max-tasks-per-child``.
    max_jobs: Count | None = None
    #: Seconds that a child serves. None: no limit.
    max_age: Positive | None = None
    #: Resident bytes that a child may have after a job, with everything that it started. None: no
    #: limit, or ``--max-memory-per-child``. Less than one MiB is a mistake of the unit.
    max_memory: Annotated[int, msgspec.Meta(ge=2**20)] | None = None
    #: The largest share by which a child's own limits are lowered below the three above, so that
    #: not all children are recycled at once (as gunicorn's max_requests_jitter).
    recycle_jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    #: Children that one job may crash, over its redeliveries to this worker, before its message is
    #: rejected. None: no limit.
    max_crashes: Count | None = 3

    @property
    def recycles(self) -> bool:
        """Whether any setting limits a child's life."""
        return any(most is not None for most in (self.max_jobs, self.max_age, self.max_memory))


class ChildSettings(CommonSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One group of external children: ``subproc_pool.children.<name>``."""

    #: The program and its arguments. A string is split as a shell would; no shell runs.
    argv: tuple[str, ...] | str
    #: Names or `fnmatch` patterns of the tasks that this group takes.
    tasks: tuple[Text, ...] = ("*",)
    #: Whether the environment starts with nothing but PATH, instead of the worker's.
    clean_env: bool = False
    #: Seconds for one job when Celery sets no limit of its own. None: no limit.
    timeout: Positive | None = 600.0
    #: Whether the child writes a `ready` line before it gets jobs.
    handshake: bool = False
    #: The longest line that a child may write, in bytes.
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 67108864
    #: How often one task may be throttled before it fails. None: no limit.
    throttle_max_retries: NotNegative | None = None
    #: The signal that tells the child of a soft time limit (``"SIGUSR1"``). None: no signal.
    soft_timeout_signal: str | None = None
    #: The most jobs at a time in a child that announces `multiplex`.
    max_in_flight: Count = 1
    #: The most jobs at a time in all children of the group. None: as many as they can have.
    concurrency: Count | None = None
    #: Seconds without a message about a job after which the job has reached its hard limit. None:
    #: no limit.
    inactivity_timeout: Positive | None = None
    #: Seconds that a child that announces `cancel` has to end a job after it was told to.
    cancel_grace: Positive = 5.0

    @property
    def command(self) -> tuple[str, ...]:
        """The program and its arguments, split."""
        return split_words(self.argv)

    def size_for(self, limit: int) -> int:
        """Return the number of children in a worker that does `limit` jobs at a time."""
        if self.size is not None:
            return self.size
        return -(-min(limit, self.concurrency or limit) // self.max_in_flight)

    def takes(self, task_name: str) -> bool:
        """Return whether a name or pattern of `tasks` matches `task_name`."""
        own = task_name.startswith(CELERY_PREFIX)
        return any(
            fnmatchcase(task_name, pattern)
            for pattern in self.tasks
            if not own or pattern.startswith(CELERY_PREFIX)
        )

    def exact_tasks(self) -> tuple[str, ...]:
        """Return the entries of `tasks` that are plain names, not patterns."""
        return tuple(name for name in self.tasks if not set(name) & set("*?["))


class PythonSettings(CommonSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The Python children, which run the project's ordinary tasks: ``subproc_pool.python``."""

    #: The interpreter, for example of another virtual environment. None: the worker's.
    executable: Text | None = None
    #: As for external children.
    concurrency: Count | None = None
    #: A program and its arguments to run each child under: ``["nice", "-n", "10"]``. A string is
    #: split as a shell would.
    wrapper: tuple[str, ...] | str = ()
    #: As for all groups, with another default.
    stderr: str = "inherit"
    #: As for all groups, with another default.
    leftovers: str = "keep"
    #: As for all groups. The default is prefork's (billiard/pool.py: `_trywaitkill`): ``finally``
    #: blocks run in that time.
    kill_grace: NotNegativeSeconds = 0.1
    #: How children start: "fork" forks them from a process that has loaded the project, "spawn"
    #: lets each one load it. "auto" forks where that is safe.
    start: str = "auto"
    #: Modules that do not survive a fork, beside those that are known: children are not forked if
    #: loading the project imports one of them.
    not_forkable: tuple[Text, ...] = ()
    #: What the worker does before its pool starts and each child repeats: values of `REPLAYABLE`.
    replay: tuple[str, ...] = ("user_preload_options", "celeryd_init", BOOTSTEPS)
    #: Seconds that functions registered with `atexit` may take when a child exits.
    exit_grace: Positive = 5.0

    @property
    def prefix(self) -> tuple[str, ...]:
        """The wrapper, split."""
        return split_words(self.wrapper)

    def as_child(self, argv: tuple[str, ...]) -> ChildSettings:
        """Return the settings as those of a group whose children are started with `argv`.

        Only Celery limits their jobs, as on prefork. SIGUSR1 tells them of a soft limit
        (billiard/pool.py: SIG_SOFT_TIMEOUT).
        """
        common = {name: getattr(self, name) for name in CommonSettings.__struct_fields__}
        return ChildSettings(
            argv=argv,
            timeout=None,
            handshake=True,
            soft_timeout_signal="SIGUSR1",
            concurrency=self.concurrency,
            **common,
        )


class AsyncioSettings(PythonSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The asyncio children, which run the project's ``async def`` tasks: ``subproc_pool.asyncio``.

    They have the settings of Python children, too.
    """

    #: The number of children. None: one.
    size: Count | None = None
    #: The most jobs that one of them has at a time. None: as many as the concurrency allows.
    max_in_flight: Count | None = None
    #: Seconds that a coroutine has to end after it was cancelled: by a hard limit, a revoke, a cold
    #: shutdown. Its child is replaced then.
    cancel_grace: Positive = 5.0
    #: Seconds that code may hold up the event loop until the log says so.
    slow_callback: Positive = 1.0
    #: An asynchronous context manager of the project: ``"proj.aio:lifespan"``. Each child enters it
    #: before its first job, and leaves it at its end.
    lifespan: Text | None = None
    #: Whether the event loop is uvloop's.
    uvloop: bool = False

    def as_child(self, argv: tuple[str, ...]) -> ChildSettings:
        """Return the settings as those of a group whose children are started with `argv`.

        The worker's limit of jobs, which may change, bounds their jobs, too.
        """
        child = super().as_child(argv)
        return msgspec.structs.replace(
            child,
            size=self.size or 1,
            max_in_flight=self.max_in_flight or UNBOUNDED,
            cancel_grace=self.cancel_grace,
            soft_timeout_signal=None,
        )


class TracerSettings(CommonSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tracers, which run Celery's tracer for external tasks: ``subproc_pool.tracers``."""

    #: The number of tracers. None: one for two CPUs that the worker may use.
    size: Count | None = None
    #: The most jobs that one of them traces at a time.
    max_in_flight: Count = 1000
    #: Seconds that a tracer has to let go of a job that has ended otherwise. It is replaced then.
    cancel_grace: Positive = 60.0
    #: As for all groups, with another default.
    stderr: str = "inherit"
    #: As for all groups, with another default.
    leftovers: str = "keep"
    #: Seconds that functions registered with `atexit` may take when a tracer exits.
    exit_grace: Positive = 5.0

    def as_child(self, argv: tuple[str, ...], size: int) -> ChildSettings:
        """Return the settings as those of a group of `size` children, which are started with
        `argv`. Their jobs have no limits: those of the jobs that they trace count."""
        common = {name: getattr(self, name) for name in CommonSettings.__struct_fields__}
        return ChildSettings(
            argv=argv,
            timeout=None,
            handshake=True,
            max_in_flight=self.max_in_flight,
            cancel_grace=self.cancel_grace,
            **{**common, "size": self.size or size},
        )


class PoolSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything under ``subproc_pool``: the groups by name, in the order written."""

    children: dict[str, ChildSettings] = {}
    python: PythonSettings = PythonSettings()
    asyncio: AsyncioSettings = AsyncioSettings()
    tracers: TracerSettings = TracerSettings()


def with_limits(
    child: ChildSettings, max_jobs: int | None, max_memory: int | None
) -> ChildSettings:
    """Return the settings of a group, with the worker's options where the group sets no limit.

    Arguments:
        child: the group's settings.
        max_jobs: jobs for each child. None or 0: no limit.
        max_memory: KiB for each child, as Celery counts. None or 0: no limit.
    """
    if max_jobs and child.max_jobs is None:
        child = msgspec.structs.replace(child, max_jobs=max_jobs)
    if max_memory and child.max_memory is None:
        child = msgspec.structs.replace(child, max_memory=max_memory * 1024)
    return child


def split_words(command: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return `command` as words, a string split as a shell would.

    Raises:
        ValueError: a quotation in the string is not closed.
    """
    return tuple(shlex.split(command)) if isinstance(command, str) else command
