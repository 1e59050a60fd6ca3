"""What programs read: JSON of our own, SARIF 2.1.0, and the annotations of GitHub's runner."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import PurePath
from typing import Any, Final
from urllib.parse import quote

from creche_server.scan.figures import Figures
from creche_server.scan.findings import Finding, Scan
from creche_server.scan.rules import RULES, rule_of

_JSON_VERSION: Final = 1
_SARIF_SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def as_json(scan: Scan, figures: Figures | None = None) -> str:
    """One object; keys are only ever added while `version` stays.

    `findings`, and `explained` with a `reason` each: `rule`, `name`, `path`, `line`, `column`
    (from 1, in characters), `message`, `symbol`, `why`, `instead`. `summary`: `files`, `findings`,
    `explained`, `by_rule`. `report`, if it was asked for: the fields of `Figures`.
    """
    told: dict[str, Any] = {
        "version": _JSON_VERSION,
        "findings": [_described(finding) for finding in scan.findings],
        "explained": [
            {**_described(item.finding), "reason": item.reason} for item in scan.explained
        ],
        "summary": {
            "files": scan.files,
            "findings": len(scan.findings),
            "explained": len(scan.explained),
            "by_rule": dict(sorted(Counter(item.rule for item in scan.findings).items())),
        },
    }
    if figures is not None:
        told["report"] = dataclasses.asdict(figures)
    return json.dumps(told, indent=2) + "\n"


def _described(finding: Finding) -> dict[str, Any]:
    rule = rule_of(finding.rule)
    return {
        "rule": finding.rule,
        "name": rule.name,
        "path": finding.path,
        "line": finding.line,
        "column": finding.column,
        "message": finding.message,
        "symbol": finding.symbol,
        "why": rule.why,
        "instead": rule.instead,
    }


def as_sarif(scan: Scan, version: str, figures: Figures | None = None) -> str:
    """A log with one run; what an escape explains is in it, as suppressed.

    Source: SARIF 2.1.0 (OASIS standard), sections 3.13, 3.14, 3.19, 3.27 and 3.35.
    """
    results = [_result(finding) for finding in scan.findings]
    results += [
        {
            **_result(item.finding),
            "suppressions": [{"kind": "inSource", "justification": item.reason}],
        }
        for item in scan.explained
    ]
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "creche scan",
                "version": version,
                "rules": [
                    {
                        "id": rule.id,
                        "name": "".join(map(str.capitalize, rule.name.split())),
                        "shortDescription": {"text": rule.name},
                        "fullDescription": {"text": rule.why},
                        "help": {"text": rule.instead},
                        "defaultConfiguration": {"level": "error"},
                    }
                    for rule in RULES
                ],
            },
        },
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    if figures is not None:
        run["properties"] = dataclasses.asdict(figures)
    log = {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2) + "\n"


def _result(finding: Finding) -> dict[str, Any]:
    return {
        "ruleId": finding.rule,
        "ruleIndex": RULES.index(rule_of(finding.rule)),
        "level": "error",
        "message": {"text": finding.message},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(finding.path)},
                    "region": {"startLine": finding.line, "startColumn": finding.column},
                },
            },
        ],
    }


def _uri(path: str) -> str:
    found = PurePath(path)
    return found.as_uri() if found.is_absolute() else quote(found.as_posix())


def as_github(scan: Scan, figures: Figures | None = None) -> str:
    """A workflow command a line, which GitHub's runner shows beside the code.

    Source: docs.github.com, "Workflow commands for GitHub Actions"; actions/toolkit, command.ts.
    """
    told = "".join(
        f"::error file={_property(finding.path)},line={finding.line},col={finding.column},"
        f"title={finding.rule}::{_data(f'{finding.message}. {rule_of(finding.rule).instead}')}\n"
        for finding in scan.findings
    )
    if figures is not None:
        summary = (
            f"isolation score {figures.isolation_score:.1f}, "
            f"context-propagation coverage {100 * figures.coverage:.1f} %, "
            f"global-state count {figures.global_state}"
        )
        told += f"::notice title=creche scan::{_data(summary)}\n"
    return told


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
