"""Sources in, a `Scan` out: every rule at every node, then the escapes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from creche_server.scan import rules
from creche_server.scan.caches import caches
from creche_server.scan.findings import Coverage, Explained, Finding, Scan
from creche_server.scan.identity import acts_for_user, ambient_identity, calls, enclosing_function
from creche_server.scan.nurseries import handed_nurseries, kept_nurseries
from creche_server.scan.project import read_project
from creche_server.scan.singletons import singletons
from creche_server.scan.source import Source, UnreadableError, module_names, read_source
from creche_server.scan.spot import Spot
from creche_server.scan.state import context_defaults, mutable_defaults, shared_state
from creche_server.scan.surroundings import process_settings
from creche_server.scan.tasks import loose_tasks
from creche_server.scan.writes import class_and_module_writes, global_writes

_CHECKS: Final[tuple[Callable[[Spot], Iterator[Finding]], ...]] = (
    shared_state,
    mutable_defaults,
    context_defaults,
    global_writes,
    class_and_module_writes,
    process_settings,
    caches,
    ambient_identity,
    loose_tasks,
    kept_nurseries,
    handed_nurseries,
    singletons,
)
# What no check looks at; the walk meets mostly these.
_DULL: Final = (ast.arguments, ast.arg, ast.keyword)


def scan_sources(files: Mapping[str, bytes]) -> Scan:
    """Scan files, {path: contents}, as one project.

    The paths are for showing, and tell which package a file belongs to; nothing is opened.
    A file that cannot be parsed is a finding of its own.
    """
    names = module_names(list(files))
    sources: list[Source] = []
    found: list[Finding] = []
    for path, data in sorted(files.items()):
        try:
            sources.append(read_source(path, data, names[path]))
        except UnreadableError as error:
            found.append(_unreadable(path, error.line, error.message))
    project = read_project(sources)
    explained: list[Explained] = []
    places = 0
    troubled = 0
    links = _Links()
    for file in project.files:
        try:
            raw: list[Finding] = []
            hits: list[tuple[str, Finding]] = []  # (place, finding)
            for place in file.places:
                if isinstance(place.node, _DULL):
                    continue
                spot = Spot(place, file, project)
                here = [finding for check in _CHECKS for finding in check(spot)]
                raw += here
                where = enclosing_function(spot) or spot.scope.name
                hits += [(where, finding) for finding in here]
                links.see(spot)
        except RecursionError:
            found.append(_unreadable(file.source.path, 1, "it is nested too deeply"))
            continue
        kept, excused = apply_escapes(file.source, raw)
        found += kept
        explained += excused
        places += 1 + sum(place.inner is not None for place in file.places)
        unexplained = set(map(id, kept))
        troubled += len({where for where, finding in hits if id(finding) in unexplained})
        links.charge(hits, unexplained)
    return Scan(
        files=len(files),
        findings=tuple(sorted(found, key=_order)),
        explained=tuple(sorted(explained, key=lambda item: _order(item.finding))),
        places=places,
        places_with_findings=troubled,
        coverage=links.coverage(),
    )


def apply_escapes(
    source: Source,
    raw: Iterable[Finding],
) -> tuple[list[Finding], list[Explained]]:
    """(findings that stand, findings that are explained). Idle and blank escapes stand, too."""
    escapes = {escape.line: escape for escape in source.escapes}
    used: set[int] = set()
    kept: list[Finding] = []
    explained: list[Explained] = []
    for finding in raw:
        found = [escapes[line] for line in finding.escapes if line in escapes]
        used.update(escape.line for escape in found)
        reasons = [escape.reason for escape in found if escape.reason]
        if reasons:
            explained.append(Explained(finding, reasons[0]))
        else:
            kept.append(finding)
    for escape in source.escapes:
        idle = escape.line not in used
        if idle or not escape.reason:
            kept.append(
                Finding(
                    rule=rules.UNUSED_ESCAPE if idle else rules.BLANK_ESCAPE,
                    path=source.path,
                    line=escape.line,
                    column=escape.column,
                    message="this escape explains nothing" if idle else "this escape has no reason",
                    source=source.line(escape.line).rstrip(),
                ),
            )
    return kept, explained


def _order(finding: Finding) -> tuple[str, int, int, str]:
    return finding.path, finding.line, finding.column, finding.rule


def _unreadable(path: str, line: int, message: str) -> Finding:
    return Finding(
        rule=rules.UNREADABLE,
        path=path,
        line=line,
        column=1,
        message=f"cannot be parsed: {message}",
    )


class _Links:
    """Who acts for a user, who reads that from global state, and who calls whom."""

    def __init__(self) -> None:
        self._acting: set[str] = set()
        self._ambient: set[str] = set()
        self._explained: set[str] = set()
        self._callers: dict[str, set[str]] = {}  # {called: its callers}

    def see(self, spot: Spot) -> None:
        self._acting.update(acts_for_user(spot))
        for caller, called in calls(spot):
            self._callers.setdefault(called, set()).add(caller)

    def charge(self, hits: Iterable[tuple[str, Finding]], unexplained: set[int]) -> None:
        for where, finding in hits:
            if finding.rule == rules.AMBIENT_IDENTITY:
                (self._ambient if id(finding) in unexplained else self._explained).add(where)

    def coverage(self) -> Coverage:
        """Whoever calls a function that looks its user up has looked him up as well."""
        ambient = set(self._ambient)
        waiting = [*ambient]
        while waiting:
            more = self._callers.get(waiting.pop(), set()) - ambient
            ambient |= more
            waiting += more
        return Coverage(
            acting=len(self._acting | ambient | self._explained),
            ambient=tuple(sorted(ambient)),
            explained=tuple(sorted(self._explained - ambient)),
        )
