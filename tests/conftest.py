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
