"""How findings are told: to people, to programs, to GitHub's runner."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any
from urllib.parse import unquote

import pytest
from tests.server.scan.scanning import SAMPLE, files_below, scan_text

from creche_server.scan import (
    RULES,
    Coverage,
    Explained,
    Finding,
    Scan,
    as_github,
    as_json,
    as_sarif,
    as_text,
    figures_of,
    rules_as_text,
    scan_sources,
)

FINDING = Finding(
    rule="CR001",
    path="a b/ü.py",
    line=3,
    column=5,
    message="`A` is a dict",
    symbol="ü.A",
    source="\tif A := {}",
)
SCAN = Scan(
    files=2,
    findings=(FINDING,),
    explained=(Explained(dataclasses.replace(FINDING, line=9), "only read"),),
    places=10,
    places_with_findings=1,
    coverage=Coverage(acting=4, ambient=("a",), explained=("b",)),
)


def plain(scan: Scan, *, report: bool = False) -> str:
    return "".join(text for _, text in as_text(scan, figures_of(scan) if report else None))


class TestText:
    def test_shows_the_line_with_a_caret(self) -> None:
        lines = plain(SCAN).splitlines()
        assert lines[0] == "a b/ü.py:3:5 CR001 `A` is a dict"
        assert lines[1] == "    3 | \tif A := {}"
        assert lines[2] == "      | \t   ^"

    def test_says_why_and_what_to_write_instead_once_for_each_rule(self) -> None:
        told = plain(scan_text("A = {}\nB = []\n\ndef f(a=[]): return a\n"))
        assert told.count("CR001 mutable object at module level (2 findings)") == 1
        assert told.count("CR006 mutable default argument (1 finding)") == 1
        assert told.count("why: ") == told.count("instead: ") == 2

    def test_counts_in_the_last_line(self) -> None:
        assert plain(SCAN).splitlines()[-1] == "1 finding in 2 files; 1 explained by escapes"
        clean = plain(scan_text("A = ()\n"))
        assert clean == "no findings in 1 file; 0 explained by escapes\n"

    def test_reports_each_figure_with_its_meaning_and_measure(self) -> None:
        report = plain(SCAN, report=True).partition("escapes\n")[2]
        for figure in (
            "isolation score               67.5",
            "context-propagation coverage  75.0 %",
            "global-state count            1",
        ):
            assert figure in report
        assert report.count("means: ") == report.count("measured: ") == 3

    def test_lists_the_rules(self) -> None:
        told = "".join(text for _, text in rules_as_text())
        for rule in RULES:
            assert f"{rule.id} {rule.name}" in told
        assert "# creche: shared REASON" in told


class TestJson:
    def test_has_its_documented_fields(self) -> None:
        told = json.loads(as_json(SCAN))
        assert set(told) == {"version", "findings", "explained", "summary"}
        assert told["version"] == 1
        (finding,) = told["findings"]
        rule = RULES[1]
        assert finding == {
            "rule": "CR001",
            "name": rule.name,
            "path": "a b/ü.py",
            "line": 3,
            "column": 5,
            "message": "`A` is a dict",
            "symbol": "ü.A",
            "why": rule.why,
            "instead": rule.instead,
        }
        assert told["explained"] == [{**finding, "line": 9, "reason": "only read"}]
        assert told["summary"] == {
            "files": 2,
            "findings": 1,
            "explained": 1,
            "by_rule": {"CR001": 1},
        }

    def test_has_the_figures_if_they_are_asked_for(self) -> None:
        assert json.loads(as_json(SCAN, figures_of(SCAN)))["report"] == {
            "isolation_score": 67.5,
            "coverage": 0.75,
            "acting": 4,
            "ambient": 1,
            "ambient_explained": 1,
            "places": 10,
            "places_with_findings": 1,
            "global_state": 1,
            "global_state_explained": 1,
        }


# What SARIF 2.1.0's schema requires (`required`), and the types of what we add beside it.
REQUIRED: dict[str, dict[str, type]] = {
    "log": {"version": str, "runs": list, "$schema": str},
    "run": {"tool": dict, "results": list, "columnKind": str},
    "driver": {"name": str, "version": str, "rules": list},
    "rule": {"id": str, "name": str, "shortDescription": dict, "help": dict},
    "message": {"text": str},
    "result": {"message": dict, "ruleId": str, "ruleIndex": int, "level": str, "locations": list},
    "suppression": {"kind": str, "justification": str},
}


def check(kind: str, value: dict[str, Any]) -> None:
    for field, of_type in REQUIRED[kind].items():
        assert isinstance(value[field], of_type), (kind, field)


class TestSarif:
    def test_has_what_the_schema_requires(self) -> None:
        scan = scan_sources(files_below(SAMPLE))
        log = json.loads(as_sarif(scan, "1.2", figures_of(scan)))
        check("log", log)
        assert log["version"] == "2.1.0"
        assert log["$schema"].endswith("sarif-schema-2.1.0.json")
        (run,) = log["runs"]
        check("run", run)
        assert run["columnKind"] in {"utf16CodeUnits", "unicodeCodePoints"}
        driver = run["tool"]["driver"]
        check("driver", driver)
        for rule in driver["rules"]:
            check("rule", rule)
            for text in ("shortDescription", "fullDescription", "help"):
                check("message", rule[text])
        assert len({rule["id"] for rule in driver["rules"]}) == len(RULES)
        assert len(run["results"]) == len(scan.findings) + len(scan.explained)
        for result in run["results"]:
            check("result", result)
            check("message", result["message"])
            assert result["level"] in {"none", "note", "warning", "error"}
            assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
            for location in result["locations"]:
                where = location["physicalLocation"]
                assert re.fullmatch(r"[\w./%-]+", where["artifactLocation"]["uri"])
                assert where["region"]["startLine"] >= 1
                assert where["region"]["startColumn"] >= 1

    def test_keeps_what_an_escape_explains_as_suppressed(self) -> None:
        (run,) = json.loads(as_sarif(SCAN, "1"))["runs"]
        first, second = run["results"]
        assert "suppressions" not in first
        (suppression,) = second["suppressions"]
        check("suppression", suppression)
        assert suppression == {"kind": "inSource", "justification": "only read"}

    def test_names_files_by_uris(self) -> None:
        (run,) = json.loads(as_sarif(SCAN, "1"))["runs"]
        uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert uri == "a%20b/%C3%BC.py"
        assert unquote(uri) == FINDING.path

    def test_of_a_clean_scan_has_no_results(self) -> None:
        assert json.loads(as_sarif(scan_text("a = 1\n"), "1"))["runs"][0]["results"] == []


class TestGithub:
    @pytest.mark.parametrize(
        ("path", "message", "line"),
        [
            ("a.py", "is a dict", "::error file=a.py,line=3,col=5,title=CR001::is a dict. "),
            ("a,b.py", "x", "::error file=a%2Cb.py,line=3,col=5,title=CR001::x. "),
            ("C:\\a.py", "x", "::error file=C%3A\\a.py,line=3,col=5,title=CR001::x. "),
            ("100%.py", "x", "::error file=100%25.py,line=3,col=5,title=CR001::x. "),
            ("a\nb.py", "x", "::error file=a%0Ab.py,line=3,col=5,title=CR001::x. "),
            (
                "a.py",
                "50%\r\nb: c, d",
                "::error file=a.py,line=3,col=5,title=CR001::50%25%0D%0Ab: c, d. ",
            ),
        ],
    )
    def test_is_a_command_a_line(self, path: str, message: str, line: str) -> None:
        finding = dataclasses.replace(FINDING, path=path, message=message)
        told = as_github(dataclasses.replace(SCAN, findings=(finding,)))
        assert told.startswith(line)
        assert told.endswith(f"{RULES[1].instead}\n")
        assert told.count("\n") == 1

    def test_adds_the_figures_as_a_notice(self) -> None:
        told = as_github(SCAN, figures_of(SCAN)).splitlines()
        assert told[-1] == (
            "::notice title=creche scan::isolation score 67.5, "
            "context-propagation coverage 75.0 %25, global-state count 1"
        )
