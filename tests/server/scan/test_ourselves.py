"""creche holds to its own rules: in its source, and in the process."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import Final

from tests.server.processes import environment
from tests.server.scan.scanning import ROOT, files_below

from creche_server.scan import figures_of, scan_sources

FOLDERS: Final = (ROOT / "core", ROOT / "server")
# Imports all there is, but what is run by path or as a program, and prints what it then holds.
PROGRAM: Final = """
import importlib, pkgutil, sys
import creche, creche_server
from creche_server.scan import count_global_state
for package in (creche, creche_server):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__") and ".migrations" not in found.name:
            importlib.import_module(found.name)
print(*count_global_state(sys.modules.copy()).names, sep="\\n")
"""


def test_nothing_is_unexplained_in_core_and_server() -> None:
    scan = scan_sources(files_below(*FOLDERS))
    assert [f"{item.path}:{item.line} {item.rule} {item.message}" for item in scan.findings] == []
    figures = figures_of(scan)
    assert figures.isolation_score == 100.0
    assert figures.coverage == 1.0
    assert figures.acting > 100, "the names that tell an identity fit our code"


def test_a_process_holds_what_the_source_explains_and_nothing_else() -> None:
    """Two ways of counting, by text and by object, agree name by name."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    explained = {
        item.finding.symbol
        for item in scan_sources(files_below(*FOLDERS)).explained
        if item.finding.rule in {"CR001", "CR002", "CR008"}
    }
    assert set(result.stdout.split()) == explained


def test_the_scanner_imports_the_standard_library_and_itself() -> None:
    for path, data in files_below(ROOT / "server" / "creche_server" / "scan").items():
        for node in ast.walk(ast.parse(data)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                is_ours = name == "creche_server.scan" or name.startswith("creche_server.scan.")
                assert is_ours or name.partition(".")[0] in sys.stdlib_module_names, (path, name)
