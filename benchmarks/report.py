"""Reports what was measured: ratios as a table, as JSON and as plots."""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from .comparisons import COMPARISONS, Comparison
from .scenarios import Measurement

__all__ = ("Report", "report")


class Ratio(msgspec.Struct, frozen=True):
    """A comparison's ratios of all rounds."""

    title: str
    low: float
    median: float
    high: float
    wanted: str
    reached: bool | None


class Report(msgspec.Struct, frozen=True):
    """Everything that `save` keeps."""

    machine: str
    versions: dict[str, str]
    ratios: list[Ratio]
    measurements: list[Measurement]


def report(measurements: Sequence[Measurement]) -> Report:
    """Return the report of what was measured."""
    ratios = (_ratio(each, measurements) for each in COMPARISONS)
    return Report(
        f"{psutil.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        {name: version(name) for name in ("celery", "kombu", "billiard", "msgspec")},
        [ratio for ratio in ratios if ratio is not None],
        list(measurements),
    )


def _ratio(comparison: Comparison, measurements: Iterable[Measurement]) -> Ratio | None:
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for each in measurements:
        if (each.scenario, each.metric) == (comparison.scenario, comparison.metric):
            values[each.setup][each.round] = each.value
    ours, theirs = values[comparison.setup], values[comparison.to]
    found = [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]
    if not found:
        return None
    median = statistics.median(found)
    wanted, reached = "", None
    if comparison.at_least is not None:
        wanted, reached = f"at least {comparison.at_least:g}", median >= comparison.at_least
    elif comparison.at_most is not None:
        wanted, reached = f"at most {comparison.at_most:g}", median <= comparison.at_most
    return Ratio(comparison.title, min(found), median, max(found), wanted, reached)


def show(made: Report) -> None:
    """Print the tables."""
    console = Console(width=120)
    table = Table("ratio", "min", "median", "max", "wanted", "", title=made.machine)
    for ratio in made.ratios:
        mark = {None: "", True: "yes", False: "no"}[ratio.reached]
        numbers = (f"{number:.2f}" for number in (ratio.low, ratio.median, ratio.high))
        table.add_row(ratio.title, *numbers, ratio.wanted, mark)
    console.print(table)
    table = Table("scenario", "metric", "of", "median")
    for (scenario, metric, setup), values in _grouped(made.measurements).items():
        table.add_row(scenario, metric, setup, f"{statistics.median(values):,.5g}")
    console.print(table)


def _grouped(measurements: Iterable[Measurement]) -> dict[tuple[str, str, str], list[float]]:
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for each in measurements:
        found[each.scenario, each.metric, each.setup].append(each.value)
    return found


def save(made: Report, folder: Path) -> None:
    """Write ``performance.json`` and the plots into `folder`."""
    text = msgspec.json.format(msgspec.json.encode(made))
    (folder / "performance.json").write_bytes(text + b"\n")
    _plot_bars(made, folder / "performance-python.svg", "python", ("prefork", "python"))
    _plot_bars(made, folder / "performance-external.svg", "external", ("sidecar", "external"))
    _plot_ratios(made, folder / "performance-ratios.svg")


def _plot_bars(made: Report, path: Path, kind: str, names: tuple[str, str]) -> None:
    """Plot no-op tasks a second: the median, with a line from the lowest to the highest round."""
    from matplotlib import pyplot

    grouped = _grouped(made.measurements)
    scenarios = [
        scenario
        for scenario in dict.fromkeys(each.scenario for each in made.measurements)
        if scenario.startswith(f"{kind}, ")
        and all((scenario, "no-op: tasks/s", name) in grouped for name in names)
    ]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for number, name in enumerate(names):
        rounds = [grouped[scenario, "no-op: tasks/s", name] for scenario in scenarios]
        medians = [statistics.median(each) for each in rounds]
        spread = [
            [median - min(each) for median, each in zip(medians, rounds, strict=True)],
            [max(each) - median for median, each in zip(medians, rounds, strict=True)],
        ]
        places = [place + 0.4 * number - 0.2 for place in range(len(scenarios))]
        axes.bar(places, medians, 0.38, label=name, yerr=spread, capsize=3)
    axes.set_xticks(range(len(scenarios)), [each.removeprefix(f"{kind}, ") for each in scenarios])
    axes.set_ylabel("no-op tasks a second")
    axes.legend()
    _write(figure, path)


def _plot_ratios(made: Report, path: Path) -> None:
    from matplotlib import pyplot

    wanted = [ratio for ratio in made.ratios if ratio.wanted][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(wanted) + 1), layout="constrained")
    for place, ratio in enumerate(wanted):
        color = "tab:green" if ratio.reached else "tab:red"
        axes.plot([ratio.low, ratio.high], [place, place], color=color)
        axes.plot([ratio.median], [place], "o", color=color)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(
        range(len(wanted)), [f"{ratio.title} ({ratio.wanted})" for ratio in wanted], fontsize=7
    )
    _write(figure, path)


def _write(figure: object, path: Path) -> None:
    from matplotlib import rcParams

    # So that the same numbers give the same file.
    rcParams["svg.hashsalt"] = "celery_subproc_pool"
    figure.savefig(path, metadata={"Date": None})  # type: ignore[attr-defined]
