"""Check the documents: README's length, relative links and their anchors, JSON examples.

Standard library only. Run from anywhere: ``python .ci/check_docs.py``. Prints one line for each
fault and exits with 1 if there is one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

README_MAX_LINES = 150

FENCE = re.compile(r"^ {0,3}(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>\w*)")
CODE_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(?P<title>.*?)[ \t#]*$")
LINKS = (
    re.compile(r"\]\(\s*<?(?P<target>[^)\s>]+)"),  # [text](target), ![alt](target)
    re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(?P<target>[^\s>]+)"),  # [label]: target
    re.compile(r"\b(?:href|src)=[\"'](?P<target>[^\"']+)[\"']"),
)
ABSOLUTE = re.compile(r"^(?:[a-zA-Z][a-zA-Z0-9+.-]*:|//)")


def documents(root: Path) -> list[Path]:
    """The documents to check; README.md always, so that a missing one is a fault."""
    found = [root / "README.md"]
    if (root / "CONTRIBUTING.md").exists():
        found.append(root / "CONTRIBUTING.md")
    return found + sorted((root / "docs").glob("**/*.md"))


def split(text: str) -> tuple[list[tuple[int, str]], list[tuple[int, str, str]]]:
    """Return the (number, line) outside of fences, and the fences as (number, language, body)."""
    prose: list[tuple[int, str]] = []
    fences: list[tuple[int, str, str]] = []
    mark, language, start, body = "", "", 0, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if not mark and fence:
            mark, language, start, body = fence["mark"], fence["language"].lower(), number, []
        elif mark and fence and fence["mark"].startswith(mark) and not fence["language"]:
            fences.append((start, language, "\n".join(body)))
            mark = ""
        elif mark:
            body.append(line)
        else:
            prose.append((number, line))
    if mark:
        fences.append((start, "unclosed", ""))
    return prose, fences


def anchors(path: Path) -> set[str]:
    """The anchors that a reader's page gives to the headings of a document."""
    seen: dict[str, int] = {}
    found: set[str] = set()
    text = path.read_text(encoding="utf-8")
    found.update(re.findall(r"\b(?:id|name)=[\"']([^\"']+)[\"']", text))
    for _, line in split(text)[0]:
        heading = HEADING.match(line)
        if heading is None:
            continue
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading["title"])
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def link_fault(root: Path, document: Path, target: str) -> str | None:
    """Say what is wrong with one link, or None."""
    if ABSOLUTE.match(target):
        return None
    name, _, anchor = unquote(target).partition("#")
    path = (document.parent / name).resolve() if name else document
    if not path.is_relative_to(root):
        return f"link leaves the repository: {target}"
    if not path.exists():
        return f"link to nothing: {target}"
    if anchor and path.suffix == ".md" and anchor.lower() not in anchors(path):
        return f"link to a missing heading: {target}"
    return None


def json_fault(body: str) -> str | None:
    """Say why an example is not JSON (one value, or one on each line), or None."""
    try:
        json.loads(body)
    except ValueError as whole:
        try:
            for line in filter(str.strip, body.splitlines()):
                json.loads(line)
        except ValueError:
            return f"not JSON: {whole}"
    return None


def faults(root: Path, document: Path) -> Iterator[tuple[int, str]]:
    """Every fault of one document as (line number, what)."""
    if not document.exists():
        yield 0, "missing"
        return
    text = document.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if document.name == "README.md" and document.parent == root and lines > README_MAX_LINES:
        yield lines, f"{lines} lines, at most {README_MAX_LINES} are wanted"
    prose, fences = split(text)
    for number, line in prose:
        bare = CODE_SPAN.sub("", line)
        for target in (match["target"] for link in LINKS for match in link.finditer(bare)):
            what = link_fault(root, document, target)
            if what is not None:
                yield number, what
    for number, language, body in fences:
        if language == "unclosed":
            yield number, "a fence that is never closed"
        what = json_fault(body) if language == "json" else None
        if what is not None:
            yield number, what


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    checked = documents(root)
    found = [
        f"{document.relative_to(root)}:{number}: {what}"
        for document in checked
        for number, what in faults(root, document)
    ]
    print(*found, sep="\n", end="\n" if found else "")
    print(f"documents: {len(checked)} checked, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
