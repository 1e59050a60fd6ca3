"""The figures of `--report`, each with what it means and how it was measured."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from creche_server.scan import rules
from creche_server.scan.findings import Scan

_OBJECTS: Final = frozenset(
    {rules.MODULE_STATE, rules.CLASS_STATE, rules.SHARED_INSTANCE, rules.SINGLETON},
)

SCORE_MEANS: Final = (
    "100 x (places without an unexplained finding / places) x context-propagation coverage, "
    "rounded down; a place is a module's body, a class's body or a function"
)
COVERAGE_MEANS: Final = (
    "of the functions that take, mention or look up an identity (user_id, RunContext, ...), the "
    "share that do not read it from a ContextVar, a thread-local, a framework's proxy or a module "
    "variable, and call no scanned function that does"
)
STATE_MEANS: Final = (
    "names at module or class level that are bound to something mutable or stateful "
    "(CR001, CR002, CR008, CR013), counted in the source; those with an escape apart"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What `--report` tells."""

    isolation_score: float  # 0 to 100; 100 only if there is nothing unexplained
    coverage: float  # 0 to 1
    acting: int  # functions that act for a user
    ambient: int  # of these, the ones that look him up
    ambient_explained: int  # more of them, which an escape explains; they count as passing
    places: int
    places_with_findings: int
    global_state: int
    global_state_explained: int


def figures_of(scan: Scan) -> Figures:
    """Count them. Without a place, or a function that acts for a user, nothing is wrong."""
    coverage = scan.coverage
    acting = coverage.acting
    passing = acting - len(coverage.ambient)
    share = passing / acting if acting else 1.0
    clean = scan.places - scan.places_with_findings
    score = 100 * (clean / scan.places if scan.places else 1.0) * share
    broken = any(finding.rule == rules.UNREADABLE for finding in scan.findings)
    if scan.findings:
        score = min(score, 99.9)  # files that cannot be read have no places
    return Figures(
        isolation_score=0.0 if broken and not scan.places else math.floor(score * 10) / 10,
        coverage=math.floor(share * 1000) / 1000,
        acting=acting,
        ambient=len(coverage.ambient),
        ambient_explained=len(coverage.explained),
        places=scan.places,
        places_with_findings=scan.places_with_findings,
        global_state=sum(finding.rule in _OBJECTS for finding in scan.findings),
        global_state_explained=sum(item.finding.rule in _OBJECTS for item in scan.explained),
    )
