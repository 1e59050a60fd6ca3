"""The isolation scanner: finds in source text what runs of different users would share.

The layout, in reading order: what a scan yields (`findings`, `rules`); how a file is read
(`source`, `scopes`, `project`, `values`, `closures`); the rules' checks (`state`, `writes`,
`surroundings`, `caches`, `identity`, `tasks`, `nurseries`, `singletons`), which look at one `spot`
each; all of it together (`scanner`);
what is told (`figures`, `text`, `machine`). Beside it, `process` counts in a running process what
the rules look for in its source. Nothing here does I/O, runs what it reads, or knows the server.
"""

from creche_server.scan.figures import Figures, figures_of
from creche_server.scan.findings import Coverage, Explained, Finding, Rule, Scan
from creche_server.scan.machine import as_github, as_json, as_sarif
from creche_server.scan.process import (
    ProcessState,
    count_global_state,
    find_global_state,
    summed,
)
from creche_server.scan.rules import RULES, rule_of
from creche_server.scan.scanner import scan_sources
from creche_server.scan.text import as_text, rules_as_text

__all__ = [
    "RULES",
    "Coverage",
    "Explained",
    "Figures",
    "Finding",
    "ProcessState",
    "Rule",
    "Scan",
    "as_github",
    "as_json",
    "as_sarif",
    "as_text",
    "count_global_state",
    "figures_of",
    "find_global_state",
    "rule_of",
    "rules_as_text",
    "scan_sources",
    "summed",
]
