"""A Celery worker pool of warm child processes, in any language, that speak line-delimited JSON.

Use: ``celery -A proj worker -P celery_subproc_pool:Pool``.

Importing this package imports nothing else: each public name is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ChildTaskError as ChildTaskError
    from .errors import ConfigError as ConfigError
    from .errors import NotInWorkerError as NotInWorkerError
    from .errors import ProtocolFault as ProtocolFault
    from .python_child.coroutines import run_coroutines as run_coroutines
    from .tracer.tasks import SubprocTask as SubprocTask
    from .worker.pool import Pool as Pool

__all__ = (
    "ChildTaskError",
    "ConfigError",
    "NotInWorkerError",
    "Pool",
    "ProtocolFault",
    "SubprocTask",
    "run_coroutines",
)

#: The release. A Python child on another interpreter must have the same one.
__version__ = "0.1.0"

#: The name of this package, for code that runs its modules or looks for them.
PACKAGE = __name__

#: The modules of the public names.
_HOME = {
    "ChildTaskError": "errors",
    "ConfigError": "errors",
    "NotInWorkerError": "errors",
    "Pool": "worker.pool",
    "ProtocolFault": "errors",
    "SubprocTask": "tracer.tasks",
    "run_coroutines": "python_child.coroutines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
