"""`creche scan`: read the files, have them scanned, print what was found."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

from rich.console import Console
from rich.text import Text

from creche_server.scan import (
    as_github,
    as_json,
    as_sarif,
    as_text,
    figures_of,
    rules_as_text,
    scan_sources,
)
from creche_server.scan.text import Piece

Format = Literal["text", "json", "sarif", "github"]

EXIT_CLEAN: Final = 0
EXIT_FOUND: Final = 1
EXIT_WRONG_USE: Final = 2

_NOT_SOURCE: Final = frozenset({"__pycache__", "node_modules", "site-packages", "venv"})


def scan(paths: Sequence[Path], output: Format, *, report: bool) -> int:
    """Scan files and folders. Returns the exit code."""
    files: dict[str, bytes] = {}
    for path in paths:
        try:
            found = {str(file): file.read_bytes() for file in _python_files(path)}
        except OSError as error:
            return _refuse(f"{error.filename or path}: {error.strerror or error}")
        if not found:
            return _refuse(f"{path}: there is no Python file in it")
        files |= found
    result = scan_sources(files)
    figures = figures_of(result) if report else None
    if output == "json":
        _write([as_json(result, figures)])
    elif output == "sarif":
        _write([as_sarif(result, version("creche"), figures)])
    elif output == "github":
        _write([as_github(result, figures)])
    else:
        _print(as_text(result, figures))
    return EXIT_FOUND if result.findings else EXIT_CLEAN


def print_rules() -> int:
    """Print what every rule is about. Returns the exit code."""
    _print(rules_as_text())
    return EXIT_CLEAN


def _python_files(path: Path) -> Iterator[Path]:
    """The file itself, or a folder's in order; hidden folders and others' packages left out.

    Raises OSError for what is not there.
    """
    if not path.is_dir():
        path.stat()
        yield path
        return
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in _NOT_SOURCE
        )
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)


def _raise(error: OSError) -> None:
    raise error


def _refuse(message: str) -> int:
    sys.stderr.write(f"creche: {message}\n")
    return EXIT_WRONG_USE


def _print(pieces: Iterator[Piece]) -> None:
    if not sys.stdout.isatty():
        _write(text for _, text in pieces)
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(Text.assemble(*((text, style) for style, text in pieces)), end="")


def _write(texts: Iterable[str]) -> None:
    try:
        sys.stdout.writelines(texts)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
