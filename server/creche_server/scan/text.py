"""What people read: findings with their line and a caret, a summary, the report, the rules.

All of it comes as (style, text) pieces: whoever has no colours joins the texts.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Final

from creche_server.scan.figures import COVERAGE_MEANS, SCORE_MEANS, STATE_MEANS, Figures
from creche_server.scan.findings import Finding, Rule, Scan
from creche_server.scan.rules import RULES

Piece = tuple[str, str]  # (style, text); the styles are rich's

_WIDTH: Final = 96  # columns


def as_text(scan: Scan, figures: Figures | None = None) -> Iterator[Piece]:
    """The findings, what they mean, and, if wanted, the figures."""
    for finding in scan.findings:
        yield from _finding(finding)
    broken = Counter(finding.rule for finding in scan.findings)
    for rule in RULES:
        if broken[rule.id]:
            yield from _rule(rule, f" ({_count(broken[rule.id], 'finding')})")
    files = _count(scan.files, "file")
    found = _count(len(scan.findings), "finding") if scan.findings else "no findings"
    yield "bold red" if scan.findings else "bold green", found
    yield "", f" in {files}; {len(scan.explained)} explained by escapes\n"
    if figures is not None:
        yield from _figures(figures)


def rules_as_text() -> Iterator[Piece]:
    """All rules, and the escape."""
    for rule in RULES:
        yield from _rule(rule, "")
    yield "", "An escape, on the line or where its statement begins: # creche: shared REASON\n"


def _finding(finding: Finding) -> Iterator[Piece]:
    yield "bold", f"{finding.path}:{finding.line}:{finding.column}"
    yield "bold red", f" {finding.rule}"
    yield "", f" {finding.message}\n"
    if finding.source:
        number = f"{finding.line:>5}"
        # Tabs stay tabs, so that the caret is under its place however wide they are.
        lead = "".join("\t" if c == "\t" else " " for c in finding.source[: finding.column - 1])
        yield "dim", f"{number} | "
        yield "", f"{finding.source}\n"
        yield "dim", f"{' ' * len(number)} | "
        yield "bold red", f"{lead}^\n"


def _rule(rule: Rule, count: str) -> Iterator[Piece]:
    yield "bold", f"{rule.id} {rule.name}"
    yield "", f"{count}\n"
    yield "", _indented("why: ", rule.why)
    yield "", _indented("instead: ", rule.instead)


def _figures(figures: Figures) -> Iterator[Piece]:
    yield "bold", f"\nisolation score               {figures.isolation_score:.1f}\n"
    clean = figures.places - figures.places_with_findings
    yield "", _indented("measured: ", f"{clean} of {_count(figures.places, 'place')} are clean")
    yield "", _indented("means: ", SCORE_MEANS)
    yield "bold", f"context-propagation coverage  {100 * figures.coverage:.1f} %\n"
    passing = figures.acting - figures.ambient
    measured = (
        f"{passing} of {_count(figures.acting, 'function')}; "
        f"{figures.ambient_explained} of them look it up with an escape"
    )
    yield "", _indented("measured: ", measured)
    yield "", _indented("means: ", COVERAGE_MEANS)
    yield "bold", f"global-state count            {figures.global_state}\n"
    explained = f"{figures.global_state_explained} more are explained by escapes"
    yield "", _indented("measured: ", explained)
    yield "", _indented("means: ", STATE_MEANS)


def _indented(label: str, text: str) -> str:
    lead = f"  {label}"
    return textwrap.fill(text, _WIDTH, initial_indent=lead, subsequent_indent=" " * 4) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
