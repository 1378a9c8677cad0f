"""Check that each row of docs/parity.md has a test on each broker, and each such test its row.

Standard library only. Run from anywhere: ``python .ci/check_parity.py``. Prints one line for each
fault and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "parity.md"
SUITE = ROOT / "tests" / "brokers" / "test_parity.py"

LINK = re.compile(r"\[(?P<test>test_\w+)\]\((?P<path>[^)]+)\)")
#: A test that asks for one of these runs once for each broker.
ON_BROKERS = {"broker", "place", "shared_worker", "limited_worker", "running_worker"}


def rows() -> Iterator[tuple[int, str, list[tuple[str, Path]]]]:
    """Yield each row's line number, what it is about, and its tests as (name, file)."""
    for number, line in enumerate(TABLE.read_text(encoding="utf-8").splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] != "what":
            links = [(match["test"], match["path"]) for match in LINK.finditer(cells[-1])]
            yield (
                number,
                cells[0],
                [(test, (TABLE.parent / path).resolve()) for test, path in links],
            )


def tests(path: Path) -> dict[str, set[str]]:
    """Return the names of a file's tests, and what each asks for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: {argument.arg for argument in node.args.args}
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def faults() -> Iterator[str]:
    """Yield every fault."""
    named: set[str] = set()
    table = list(rows())
    if not table:
        yield "docs/parity.md: no table"
    for number, what, links in table:
        where = f"docs/parity.md:{number}: {what}"
        if not links:
            yield f"{where}: no test"
        for test, path in links:
            named.add(test)
            known = tests(path) if path.exists() else {}
            if test not in known:
                yield f"{where}: there is no {test} in {path.name}"
            elif not known[test] & ON_BROKERS:
                yield f"{where}: {test} does not run on both brokers"
    for test in sorted(set(tests(SUITE)) - named):
        yield f"tests/brokers/test_parity.py: {test} has no row in docs/parity.md"


def main() -> int:
    found = list(faults())
    print(*found, sep="\n", end="\n" if found else "")
    print(f"parity: {len(list(rows()))} rows, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
