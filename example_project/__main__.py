"""The demo: text jobs in perl and gate jobs in shell, through a real worker."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

POOL = "celery_subproc_pool:Pool"
CONCURRENCY = 4
MOST_TEXTS = 400
MISSING, MISSING_TEXTS = "missing-", 2
GATE_JOBS = 40
#: Seconds for all jobs of one worker, and for its end.
DEADLINE, STOP_DEADLINE = 50.0, 20.0

Results = dict[str, list[Any]]


class DemoError(Exception):
    """The demo failed."""


def find_texts() -> list[str]:
    """Return licences and documents of Python and its packages, in a fixed order."""
    paths = sysconfig.get_paths()
    folders = (Path(paths["purelib"]), Path(paths["stdlib"]))
    found = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in {".txt", ".md", ".rst"} or path.name.startswith(("LICENSE", "METADATA"))
    }
    return sorted(str(path) for path in found if path.is_file())[:MOST_TEXTS]


@contextmanager
def worker(pool: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker. On leaving, stop it and check its exit status."""
    command = [sys.executable, "-m", "celery", "-A", "example_project.app", "worker", "-P", pool]
    command += ["-c", str(CONCURRENCY), "-l", "INFO", "--without-mingle", "--without-gossip"]
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
        process.terminate()
        if status := process.wait(STOP_DEADLINE):
            raise DemoError(f"the worker exited with status {status}")
    except (DemoError, subprocess.TimeoutExpired) as exc:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise DemoError(f"{exc}\n\nThe end of the worker's log:\n{tail}") from exc
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Any]:
    """Show a progress bar, and yield a function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"{title:<40}", total=total)
        yield lambda: progress.advance(task)


def run_jobs(console: Console, pool: str, jobs: list[tuple[str, Any]]) -> Results:
    """Send the jobs to a worker on `pool`. Check the results and return them by task."""
    from .app import FOLDER, app

    with worker(pool, FOLDER) as process:
        results: Results = {}
        for task, argument in jobs:
            results.setdefault(task, []).append(app.send_task(task, [argument]))
        with bar(console, f"worker -P {pool}", len(jobs)) as advance:
            wait_for(results, process, advance)
        check(results, jobs)
    return results


def wait_for(results: Results, process: subprocess.Popen[bytes], advance: Any) -> None:
    """Wait for all results. Raise if the worker exits first, or at the deadline."""
    deadline = time.monotonic() + DEADLINE
    waiting = {task: deque(many) for task, many in results.items()}
    while any(waiting.values()):
        # Jobs of one kind end nearly in order: it is enough to look at the first one.
        for queue in waiting.values():
            while queue and queue[0].ready():
                queue.popleft()
                advance()
        if process.poll() is not None:
            raise DemoError(f"the worker exited by itself with status {process.returncode}")
        if time.monotonic() > deadline:
            left = {task: len(queue) for task, queue in waiting.items()}
            raise DemoError(f"after {DEADLINE:.0f} seconds these jobs had no result: {left}")
        time.sleep(0.05)


def check(results: Results, jobs: list[tuple[str, Any]]) -> None:
    """Raise unless the jobs with a missing file failed and all others succeeded."""
    missing = [argument for task, argument in jobs if Path(str(argument)).name.startswith(MISSING)]
    failed = [result for many in results.values() for result in many if result.state == "FAILURE"]
    if len(failed) != len(missing):
        reasons = "\n".join(str(result.result) for result in failed[:5])
        raise DemoError(f"{len(failed)} jobs failed, expected {len(missing)}:\n{reasons}")


def run_spawned(console: Console, texts: list[str]) -> tuple[list[Any], float]:
    """Run each text job in a new process. Return the results and the seconds taken."""
    from .app import ask_new_process

    began = time.monotonic()
    results = []
    shown = bar(console, "one process per job, no Celery", len(texts))
    with ThreadPoolExecutor(CONCURRENCY) as threads, shown as advance:
        try:
            for result in threads.map(ask_new_process, texts):
                results.append(result)
                advance()
        except (RuntimeError, subprocess.CalledProcessError) as exc:
            raise DemoError(f"a process started for one job failed: {exc}") from exc
    return results, time.monotonic() - began


def rate(results: list[Any]) -> float:
    """Return jobs per second between the first and the last end. Boot time does not count."""
    ends = sorted(result.date_done for result in results)
    return float((len(ends) - 1) / (ends[-1] - ends[0]).total_seconds())


def succeeded(results: list[Any]) -> list[Any]:
    """Return what the successful tasks returned."""
    return [result.result for result in results if result.state == "SUCCESS"]


def words(stats: list[Any]) -> int:
    """Return the number of words in all texts."""
    return sum(result["words"] for result in stats)


def outcomes(results: Results) -> Counter[tuple[str, str]]:
    """Count the jobs by task and final state."""
    return Counter((task, result.state) for task, many in results.items() for result in many)


def outcome_table(results: Results) -> Table:
    """Return the jobs by task and outcome."""
    meaning = {
        ("text.stats", "FAILURE"): "missing files: an error reply, and the child stays",
        ("gate.pass", "SUCCESS"): "let through, some after being throttled",
    }
    table = Table("Task", "Outcome", "Jobs", "", title="Jobs")
    for (task, state), count in sorted(outcomes(results).items()):
        table.add_row(task, state, str(count), meaning.get((task, state), ""))
    return table


def children_table(results: Results) -> Table:
    """Return the processes that did the jobs, by the pids in their results."""
    table = Table("Task", "Child's pid", "Jobs", title="Children: each was started once")
    for task, many in sorted(results.items()):
        jobs = Counter(result["pid"] for result in succeeded(many))
        for pid, count in sorted(jobs.items()):
            table.add_row(task, str(pid), str(count))
    return table


def figures_table(results: Results) -> Table:
    """Return the sums of all results."""
    stats = succeeded(results["text.stats"])
    longest = max((result["longest_word"] for result in stats), key=len)
    throttles = [result["throttles"] for result in succeeded(results["gate.pass"])]
    table = Table("What", "How many", title="Figures")
    table.add_row("words counted", f"{words(stats):,}")
    table.add_row("sentences counted", f"{sum(result['sentences'] for result in stats):,}")
    table.add_row("letters in the longest word", f"{len(longest):,}")
    table.add_row("gate jobs throttled at least once", str(sum(map(bool, throttles))))
    table.add_row("throttled replies, none of them a failure", str(sum(throttles)))
    return table


def comparison_table(warm: float, prefork: float, bare: float) -> Table:
    """Compare the three ways to do the text jobs, in jobs per second."""
    table = Table("The same texts", "Jobs/s", "Warm children are", title="Speed")
    table.add_row("warm children, in Celery on this pool", f"{warm:.0f}", "")
    for way, speed in (
        ("one process per job, in Celery on prefork", prefork),
        ("one process per job, and no Celery", bare),
    ):
        table.add_row(way, f"{speed:.0f}", f"{warm / speed:.2f} times as fast")
    table.caption = f"{CONCURRENCY} jobs at a time. In Celery: its broker and results are included."
    return table


def demo(console: Console, folder: Path) -> None:
    """Run the jobs in all three ways, and show the results."""
    texts = find_texts()
    text_jobs = [("text.stats", path) for path in texts]
    missing = [("text.stats", str(folder / f"{MISSING}{n}.txt")) for n in range(MISSING_TEXTS)]
    gate_jobs: list[tuple[str, Any]] = [("gate.pass", number) for number in range(GATE_JOBS)]

    results = run_jobs(console, POOL, gate_jobs + missing + text_jobs)
    on_prefork = run_jobs(console, "prefork", text_jobs)["text.stats"]
    spawned, seconds = run_spawned(console, texts)

    stats = succeeded(results["text.stats"])
    counts = {words(stats), words(succeeded(on_prefork)), words(spawned)}
    if len(counts) != 1:
        raise DemoError(f"the three ways counted different numbers of words: {counts}")

    console.print(outcome_table(results), children_table(results), figures_table(results))
    console.print(
        comparison_table(rate(results["text.stats"]), rate(on_prefork), len(spawned) / seconds)
    )


def main() -> int:
    """Run the demo in a temporary folder; return the exit status."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="celery-example-") as temporary:
        folder = Path(os.environ.setdefault("EXAMPLE_PROJECT_FOLDER", temporary))
        try:
            demo(console, folder)
        except DemoError as exc:
            console.print("[bold red]The demo failed:[/]", end=" ")
            console.print(str(exc), markup=False, highlight=False, soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
