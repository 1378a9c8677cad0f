"""The command: ``python -m benchmarks``, as ``tox -e bench`` runs it."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from . import report
from .scenarios import Plan, run


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often everything is measured.")
@click.option("--only", default="", help="The beginning of scenarios' names.")
@click.option("--quick", is_flag=True, help="A few tasks and children, to see that it runs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="A folder for the report as JSON and its plots.",
)
def main(rounds: int, only: str, quick: bool, out: Path | None) -> None:
    """Compare this pool with prefork, and with what people do without it.

    Needs RabbitMQ (guest/guest) and Redis on 127.0.0.1, and perl.
    """
    console = Console(stderr=True)
    plan = Plan(1, share=0.02, large=False) if quick else Plan(rounds)
    found = run(plan, lambda scenario: console.print(f"... {scenario}", highlight=False), only)
    made = report.report(found)
    report.show(made)
    if out is not None:
        report.save(made, out)


main()
