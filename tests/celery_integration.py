"""Celery's own integration tests, against real workers: what passes on prefork must pass on ours.

Celery says nowhere what a pool has to do. Its integration tests come closest: canvas, retries,
revokes, remote control. They are part of Celery's source distribution; pip fetches the one of the
version that is installed, and nothing of it is kept here.

Celery runs them with a worker in a thread of the test process. Here they get a `celery worker`
command (`celery_integration_plugin.py`), since that is what people run. A few look into the memory
of the worker: these run with `--in-process` only, which is Celery's way.

Each run has a Redis server of its own: the tests read and write database 0, and count the
subscriptions of all clients. So the tests are shared out to several workers, which run at once for
both pools: they wait most of the time.

With `--coroutines`, our workers have `async def` tasks of the same names
(`celery_integration_coroutines.py`). Their jobs run in asyncio children, and the tests must not
notice. Prefork, which can't await, keeps the tasks as they are.

    python -m tests.celery_integration
    python -m tests.celery_integration --coroutines --quick
    python -m tests.celery_integration --pool prefork -k chord
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from tests.celery_integration_coroutines import copy_with_coroutines

PREFORK = "prefork"
OURS = "celery_subproc_pool:Pool"

#: Beside Celery's source distribution: what `--coroutines` makes of it.
COROUTINES = "coroutines"

FOLDER = "t/integration/"
MODULES = ("test_tasks.py", "test_canvas.py", "test_inspect.py")

#: These need the worker in their own process: they read its state, logs, signals or pid. The
#: beginnings of pytest's names for them, as in `SLOW`.
IN_PROCESS = (
    "test_tasks.py::test_tasks::test_send_task_without_ignore_result_uses_task_ignore_result",
    "test_tasks.py::test_tasks::test_send_task_without_ignore_result_stores_result",
    "test_tasks.py::test_tasks::test_revoked_by_headers_simple_canvas",
    "test_tasks.py::test_task_redis_result_backend::test_retry_preserves_ignore_result",
    "test_tasks.py::test_task_replacement::test_replaced_task_nesting_level",
    "test_tasks.py::test_task_replacement::test_replaced_task_nesting_chain",
    "test_tasks.py::test_signal_bound_method_receivers::",
    "test_canvas.py::test_stamping_mechanism::test_task_received_has_access_to_stamps",
    "test_canvas.py::test_stamping_mechanism::test_linking_stamped_sig",
    "test_canvas.py::test_stamping_mechanism::test_err_linking_stamped_sig",
    "test_inspect.py::test_Inspect::test_stats",
    "test_inspect.py::test_Inspect::test_hello_stamps_received_revoked_ids_locally",
)

#: Left out always: the log records of children, which Celery's test worker brings to the test for
#: prefork alone, by the pool's name.
PREFORK_ONLY = ("test_tasks.py::test_trace_log_arguments::",)

#: Left out with `--quick`. All but the last wait up to 20 times ten seconds, to see that a callback
#: is not called; the last is known to fail on Redis, and takes its minute to do so.
SLOW = (
    "test_canvas.py::test_chord::test_enabling_flag_allow_error_cb_on_chord_header",
    "test_canvas.py::test_chord::test_disabling_flag_allow_error_cb_on_chord_header",
    "test_canvas.py::test_chord::test_flag_allow_error_cb_on_chord_header_on_upgraded_chord",
    "test_canvas.py::test_chord::test_nested_chord_header_link_error",
    "test_canvas.py::test_chord::test_error_propagates_from_chord",
)

#: Seconds: for one test, for a slow one, for one run, for a server to answer, for pytest to stop.
TEST_LIMIT = 90
SLOW_LIMIT = 400
RUN_LIMIT = 1200
SERVER_LIMIT = 20
STOP_LIMIT = 30

#: So many are no accident, and not tried again.
MOST_RETRIES = 40

#: What pytest exits with when it is through: all well, failures, no tests in this share.
THROUGH = (0, 1, 5)


def fetch_tests(directory: Path) -> Path:
    """Unpack Celery's tests, without Celery itself: the installed one is to be used."""
    version = importlib.metadata.version("celery")
    command = [
        *(sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"),
        *("--no-deps", "--no-binary", "celery", "--dest", str(directory), f"celery=={version}"),
    ]
    subprocess.run(command, check=True, timeout=300)
    [archive] = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    [unpacked] = (path for path in directory.iterdir() if path.is_dir())
    shutil.rmtree(unpacked / "celery")
    return unpacked


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SERVER_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    sys.exit("redis-server does not start")


@contextmanager
def redis_server(directory: Path) -> Iterator[int]:
    """Run a Redis server that keeps nothing; yield its port."""
    if shutil.which("redis-server") is None:
        sys.exit("needs the program redis-server")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--save", "", "--appendonly", "no", "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def rabbitmq_vhost() -> Iterator[str]:
    """Make a virtual host on the RabbitMQ that runs here, as root; yield its URL."""
    name = f"csp-{uuid.uuid4().hex}"

    def control(*words: str) -> None:
        subprocess.run(["rabbitmqctl", "--quiet", *words], check=True, timeout=60)

    control("add_vhost", name)
    try:
        control("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        yield f"amqp://guest:guest@127.0.0.1:5672/{name}"
    finally:
        control("delete_vhost", name)


class Run:
    """A context manager: pytest on one pool, killed on exit with all that it has started.

    Arguments:
        pool: as for `celery worker -P`.
        name: for the files that are written.
        source: Celery's unpacked source distribution.
        logs: the directory for those files.
        options: of the command line.
        share: which share of the tests, and of how many; None for those of `IN_PROCESS`.
        only: the tests to run; all if empty.
    """

    def __init__(
        self,
        pool: str,
        name: str,
        source: Path,
        logs: Path,
        options: argparse.Namespace,
        share: tuple[int, int] | None = (0, 1),
        only: Sequence[str] = (),
    ) -> None:
        self.pool = pool
        self._coroutines = options.coroutines and pool == OURS
        #: Where the worker finds its tasks.
        self._tasks = source.parent / COROUTINES if self._coroutines else source
        #: Where pytest runs. It may be the worker, too.
        self._source = self._tasks if share is None else source
        self._options = options
        self._share = share
        self._only = only
        self._worker_log = logs / f"{name}.worker.log"
        self._pytest_log = logs / f"{name}.pytest.log"
        self._results = logs / f"{name}.jsonl"
        self._results.touch()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            port = stack.enter_context(redis_server(self._results.parent))
            broker = f"redis://127.0.0.1:{port}/1"
            if self._options.broker == "rabbitmq":
                broker = stack.enter_context(rabbitmq_vhost())
            self._begun = time.monotonic()
            with self._pytest_log.open("w") as log:
                self._process = subprocess.Popen(
                    self._command(),
                    cwd=self._source,
                    env=self._environment(port, broker),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A process group, with the worker in it.
                    start_new_session=True,
                )
            stack.callback(self._kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _command(self) -> list[str]:
        plugins = ("pytest_timeout", "celery.contrib.pytest", "tests.celery_integration_plugin")
        return [
            *(sys.executable, "-m", "pytest", "-ra", "--tb=short", "--durations=30"),
            *(word for plugin in plugins for word in ("-p", plugin)),
            *("-p", "no:cacheprovider", "-k", self._options.keyword),
            *(self._only or [FOLDER + module for module in MODULES]),
        ]

    def _environment(self, port: int, broker: str) -> dict[str, str]:
        plugin = {
            "pool": self.pool,
            "concurrency": self._options.concurrency,
            "share": self._share,
            "left_out": [FOLDER + name for name in PREFORK_ONLY],
            "in_process": [FOLDER + name for name in IN_PROCESS],
            "slow": [FOLDER + name for name in SLOW],
            "quick": self._options.quick,
            "limit": TEST_LIMIT,
            "slow_limit": SLOW_LIMIT,
            "worker_log": str(self._worker_log),
            "tasks": str(self._tasks),
            "coroutines": self._coroutines,
            "results": str(self._results),
        }
        return {
            **os.environ,
            "CELERY_INTEGRATION": json.dumps(plugin),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join([str(self._source), str(Path(__file__).parents[1])]),
            "WORKER_LOGLEVEL": "INFO",  # of one in a thread
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(port),
            "TEST_BROKER": broker,
            # The database in which the tests look for its keys.
            "TEST_BACKEND": f"redis://127.0.0.1:{port}/0",
        }

    def wait(self) -> dict[str, str]:
        """Wait for pytest to end; return how each test did."""
        try:
            status = self._process.wait(max(0, self._begun + RUN_LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{self.pool}: not done after {RUN_LIMIT} s, see {self._pytest_log}")
        else:
            if status not in THROUGH:
                print(f"{self.pool}: pytest ended with {status}, see {self._pytest_log}")
        return dict(json.loads(line) for line in self._results.read_text().splitlines())

    def _kill(self) -> None:
        # pytest stops the worker.
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


Results = dict[str, dict[str, str]]


def run_all(pools: Sequence[str], source: Path, logs: Path, options: argparse.Namespace) -> Results:
    """Run the tests on all pools at once; return how each test did on each pool."""
    count = options.shares
    shares: list[tuple[int, int] | None] = [(index, count) for index in range(count)]
    if options.in_process:
        shares = [None]
    results: Results = {pool: {} for pool in pools}
    with ExitStack() as stack:
        runs = []
        for pool in pools:
            for number, share in enumerate(shares, start=1):
                name = f"{pool.partition(':')[0]}-{number}"
                run = Run(pool, name, source, logs, options, share)
                runs.append(stack.enter_context(run))
        for run in runs:
            results[run.pool].update(run.wait())
    return results


def run_again(
    tests: Sequence[str], source: Path, logs: Path, options: argparse.Namespace
) -> Results:
    """Run a few tests on both pools once more."""
    share = None if options.in_process else (0, 1)
    results = {}
    with ExitStack() as stack:
        runs = []
        for pool in (PREFORK, OURS):
            name = f"{pool.partition(':')[0]}-again"
            runs.append(
                stack.enter_context(Run(pool, name, source, logs, options, share, only=tests))
            )
        for run in runs:
            results[run.pool] = run.wait()
    return results


def worse(results: Results) -> list[str]:
    """Return the tests that pass on prefork only."""
    ours = results[OURS]
    return [
        name
        for name, outcome in results[PREFORK].items()
        if outcome == "passed" and ours.get(name) != "passed"
    ]


def show(title: str, names: Sequence[str]) -> None:
    if names:
        print(f"\n{title}:", *names, sep="\n    ")


def check(pools: Sequence[str], source: Path, logs: Path, options: argparse.Namespace) -> bool:
    """Run the tests and print what came of it; return whether all is well."""
    begun = time.monotonic()
    results = run_all(pools, source, logs, options)
    for pool in pools:
        count = Counter(results[pool].values())
        kinds = ", ".join(f"{count[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        print(f"{pool}: {kinds}")
        failed = [name for name, outcome in results[pool].items() if outcome == "failed"]
        show(f"fail on {pool}", failed)
    print(f"\n{time.monotonic() - begun:.0f} s")
    if not all("passed" in results[pool].values() for pool in pools):
        print("nothing passes")
        return False
    if len(pools) == 1:
        return not failed
    lost = worse(results)
    if 0 < len(lost) <= MOST_RETRIES:
        show("pass on prefork only, tried again", lost)
        lost = worse(run_again(lost, source, logs, options))
    show("PASS ON PREFORK, NOT ON OURS", lost)
    return not lost


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.celery_integration")
    add = parser.add_argument
    add("--pool", choices=(PREFORK, OURS, "both"), default="both")
    add("--broker", choices=("redis", "rabbitmq"), default="redis")
    add("--concurrency", type=int, default=1, help="of each worker; Celery's tests expect 1")
    add("--shares", type=int, default=3, help="how many workers share the tests, for each pool")
    add("--quick", action="store_true", help="leave out the slowest tests")
    add("--in-process", action="store_true", help="only the tests that need the worker in a thread")
    add("--coroutines", action="store_true", help="our pool's workers have async def tasks")
    add("-k", dest="keyword", default="", metavar="EXPRESSION", help="as for pytest")
    return parser.parse_args(arguments)


def stop(signum: int, _: FrameType | None) -> None:
    """Leave as after Ctrl-C, so that nothing goes on running."""
    sys.exit(128 + signum)


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, stop)
    pools = (PREFORK, OURS) if options.pool == "both" else (options.pool,)
    logs = Path(tempfile.mkdtemp(prefix="celery-integration-"))
    print(f"logs of the workers and of pytest, kept if not all is well: {logs}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        source = fetch_tests(Path(directory))
        if options.coroutines:
            copy_with_coroutines(source, source.parent / COROUTINES)
        well = check(pools, source, logs, options)
    if well:
        shutil.rmtree(logs)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
