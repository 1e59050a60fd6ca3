"""What the scanner's tests have in common: small projects as text, and the marks of the sample."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from creche_server.scan import Scan, scan_sources

ROOT: Final = Path(__file__).parents[3]
SAMPLE: Final = Path(__file__).parent / "sample"

_MARK: Final = re.compile(r"# -> (CR\d{3}(?: CR\d{3})*)$")


def files_below(*folders: Path) -> dict[str, bytes]:
    """{path from the project's root: contents} of all Python files there."""
    found = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in found}


def scan_text(text: str) -> Scan:
    """Scan one file, `main.py`."""
    return scan_files({"main.py": text})


def scan_files(texts: Mapping[str, str]) -> Scan:
    """Scan {path: text} as one project."""
    return scan_sources({path: textwrap.dedent(text).encode() for path, text in texts.items()})


def told(scan: Scan) -> list[str]:
    """`LINE RULE` of each finding."""
    return [f"{finding.line} {finding.rule}" for finding in scan.findings]


def marked(files: dict[str, bytes]) -> Counter[tuple[str, int, str]]:
    """(path, line, rule) of every mark: how often the rule must be reported there."""
    return Counter(
        (path, number, rule)
        for path, data in files.items()
        for number, line in enumerate(data.decode().split("\n"), 1)
        if (match := _MARK.search(line))
        for rule in match[1].split()
    )
