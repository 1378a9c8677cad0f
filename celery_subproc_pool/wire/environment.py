"""The environment variables by which the worker tells its children something.

A Python child reads them before it may import anything else. The guardian's `MARK`
is defined in `engine/guardian.py`, which is a script of its own.
"""

from __future__ import annotations

__all__ = ("FIRST", "SLOT", "STDERR", "STDOUT", "TEMPLATE")

#: A child's place in its group, from 0 on.
SLOT = "CELERY_SUBPROC_POOL_SLOT"

#: Set for one Python child: it is the one that logs what is odd about the project.
FIRST = "CELERY_SUBPROC_POOL_FIRST"

#: The descriptors of the worker's own stdout and stderr, handed over to a Python child.
STDOUT = "CELERY_SUBPROC_POOL_STDOUT"
STDERR = "CELERY_SUBPROC_POOL_STDERR"

#: Set for a template: the descriptor of the socket by which the worker asks it to fork.
TEMPLATE = "CELERY_SUBPROC_POOL_TEMPLATE"
