"""What a scan yields: findings, those that an escape explains, and the rules they break."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Its id is never given to another."""

    id: str
    name: str
    why: str
    instead: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One place where a rule is broken. Lines and columns count from 1, columns in characters."""

    rule: str
    path: str
    line: int
    column: int
    message: str
    symbol: str = ""  # what is shared, as `package.module.name`, where it has a name
    source: str = ""  # the line as it is written
    escapes: tuple[int, ...] = ()  # the lines at which an escape explains it


@dataclasses.dataclass(frozen=True, slots=True)
class Explained:
    """A finding that an escape silences, with the reason that the escape gives."""

    finding: Finding
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """How the functions that act for a user come by whom they act for."""

    acting: int  # functions that take, hold or mention an identity, or look one up
    ambient: tuple[str, ...]  # of these, the ones that take it from global state
    explained: tuple[str, ...]  # the ones that do so by an escape; not among `ambient`


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """The whole result, in the order of paths and lines."""

    files: int
    findings: tuple[Finding, ...]
    explained: tuple[Explained, ...]
    places: int  # module bodies, class bodies and functions
    places_with_findings: int
    coverage: Coverage
