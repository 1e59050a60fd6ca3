"""One file's text: its lines, its tree, and the escapes that its comments hold."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import tokenize
import warnings
from pathlib import PurePath
from typing import Final

# The escape stands alone or behind another tool's comment; a further `#` ends its reason.
_ESCAPE: Final = re.compile(r"#\s*creche:\s*shared\b\s*(?P<reason>[^#]*)")
_NEWLINE: Final = re.compile(r"\r\n?")


class UnreadableError(Exception):
    """A file that cannot be parsed: what is wrong, and on which line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclasses.dataclass(frozen=True, slots=True)
class Escape:
    """A comment that says why what stands on its line may be shared; the reason may be blank."""

    line: int
    column: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A file that was parsed."""

    path: str
    lines: tuple[str, ...]
    tree: ast.Module
    escapes: tuple[Escape, ...]
    module: str  # its dotted name, from the outermost scanned package on

    @property
    def is_package(self) -> bool:
        return PurePath(self.path).stem == "__init__"

    def line(self, number: int) -> str:
        """The line's text; empty where there is none."""
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""

    def column(self, node: ast.expr | ast.stmt) -> int:
        """Where the node begins, from 1, in characters: the tree counts bytes."""
        before = self.line(node.lineno).encode()[: node.col_offset]
        return len(before.decode(errors="replace")) + 1


def read_source(path: str, data: bytes, module: str) -> Source:
    """Parse a file's contents. Raises UnreadableError, and nothing else."""
    try:
        text = _decoded(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is not our subject
            tree = ast.parse(text)
        # The last line of a tree counts from 1; other separators than \n are within lines.
        return Source(path, tuple(text.split("\n")), tree, _escapes(text), module)
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        raise UnreadableError(line or 1, str(error.args[0])) from error
    except (ValueError, LookupError) as error:  # null bytes, bytes that are not the encoding's
        raise UnreadableError(1, str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise UnreadableError(1, "it is nested too deeply") from error


def _decoded(data: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return _NEWLINE.sub("\n", data.decode(encoding))


def _escapes(text: str) -> tuple[Escape, ...]:
    if _ESCAPE.search(text) is None:
        return ()
    found: list[Escape] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and (match := _ESCAPE.search(token.string)):
            line, column = token.start
            reason = match["reason"].strip()
            stated = reason if any(map(str.isalpha, reason)) else ""
            found.append(Escape(line, column + match.start() + 1, stated))
    return tuple(found)


def module_names(paths: list[str]) -> dict[str, str]:
    """{path: dotted name}; a package reaches as far up as there are `__init__.py` among the paths.

    Two files of the same name in no package are two scripts, and share it.
    """
    packages = {PurePath(path).parent for path in paths if PurePath(path).name == "__init__.py"}
    return {path: _module_name(PurePath(path), packages) for path in paths}


def _module_name(path: PurePath, packages: set[PurePath]) -> str:
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while folder in packages and folder.name:
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) or path.stem
