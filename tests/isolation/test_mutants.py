"""Every planted leak is caught: the checks of the proof can fail, each for its own reason."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import cast

import pytest
from tests.isolation import mutants
from tests.isolation.exploring import explore
from tests.isolation.mutants import MUTANTS
from tests.isolation.reachability import alive, nothing_is_reachable
from tests.isolation.report import MOST_SEEDS, Caught, hunt

from creche_server.scan import scan_sources


@pytest.fixture(scope="module")
def hunted() -> dict[str, Caught]:
    """What has been caught so far, so that the last test need not hunt again."""
    return {}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_leak_is_caught(
    name: str,
    hunted: dict[str, Caught],
    record_property: Callable[[str, object], None],
):
    caught = hunted[name] = hunt(name)
    assert caught.findings, f"nobody noticed: {caught.what}"
    record_property("caught by", ", ".join(caught.checks))
    record_property("after", caught.after)


def test_without_a_leak_the_same_stories_are_clean():
    before = alive()
    judged = explore(range(MOST_SEEDS))
    assert [story for story in judged if story.findings] == []
    assert nothing_is_reachable(before) == []


def test_the_scanner_sees_those_that_are_plain_in_source():
    """Most are planted from outside here; these would be found in an agent's own source, too."""
    source = inspect.getsource(mutants)
    seen = {
        node.name.replace("_", " "): finding.rule
        for finding in scan_sources({"mutants.py": source.encode()}).findings
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and node.lineno <= finding.line <= cast("int", node.end_lineno)
    }
    assert seen == {
        "mutable default argument": "CR006",
        "context var with a mutable default": "CR010",
        "task that outlives the run": "CR012",
        "class written by its instances": "CR004",
    }


def test_there_are_many_kinds_and_many_checks_that_catch_them(hunted: dict[str, Caught]):
    assert len(MUTANTS) >= 20
    every = {check for name in MUTANTS for check in (hunted.get(name) or hunt(name)).checks}
    assert every >= {
        "audit",
        "canary in agents",
        "canary in audit",
        "canary in frames",
        "canary in logs",
        "canary in returns",
        "canary in rows",
        "canary in spans",
        "crash",
        "delivery",
        "ends",
        "foreign ids",
        "gaps",
        "grammar",
        "isolation violation",
        "left over",
        "reachability",
        "spans",
        "terminal count",
    }
