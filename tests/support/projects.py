"""Projects of several shapes, and what most tests of a worker do with them."""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

from tests.support.basics import DEADLINE, python_child
from tests.support.worker import Project

POOL = ("-P", "celery_subproc_pool:Pool")


def obeying(directory: Path, **settings: Any) -> Project:
    """A project of external children."""
    child = {"argv": python_child("obeys"), "tasks": ["do.it"], **settings}
    return Project(directory, conf={"subproc_pool": {"children": {"obeys": child}}})


def ask(project: Project, name: str, *args: Any) -> Any:
    return project.app.send_task(name, args).get(timeout=DEADLINE, interval=0.02)


class Shaped(Project):
    """A project of another shape than one module, started in another way.

    Arguments:
        directory: where.
        files: the text of each file; ``{header}`` is what makes the app.
        start: what comes before ``worker`` on the command line.
        conf: configuration of the app.
    """

    def __init__(
        self,
        directory: Path,
        files: dict[str, str],
        start: list[str],
        conf: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(directory, conf=conf)
        header = (directory / "proj.py").read_text()
        (directory / "proj.py").unlink()
        for name, text in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("{header}", header))
        self._start = start

    def command(self, *words: str) -> list[str]:
        return [sys.executable, *self._start, *words]


CELERY = ["-m", "celery"]
RESULTS = "folder_broker:Backend+file://"


def another_venv(directory: Path, *, equipped: bool) -> str:
    """Make a virtual environment, with or without the packages of this one; return its Python."""
    venv.create(directory, symlinks=True)
    if equipped:
        [library] = directory.glob("lib/python*/site-packages")
        lines = [sysconfig.get_path("purelib"), str(Path(__file__).parents[2])]
        (library / "equipped.pth").write_text("\n".join(lines))
    return str(directory / "bin" / "python")
