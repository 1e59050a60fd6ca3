"""What all tests share."""

from __future__ import annotations

import pytest

# Their asserts tell as much as those of a test's own file.
pytest.register_assert_rewrite(
    "tests.agui_rules",
    "tests.server.bare",
    "tests.server.processes",
    "tests.server.running",
    "tests.server.scan.scanning",
    "tests.small_world",
    "tests.store_contract",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here, since only the first conftest may add an option."""
    parser.addoption("--seed", type=int, help="the one interleaving that tests/isolation plays")
