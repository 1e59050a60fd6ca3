"""Limits that would stop everything, or nothing, are refused where they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from creche import Limits


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_no_limit_is_negative_or_no_number(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"Limits\.{name} must be"):
        Limits(**wrong)


@pytest.mark.parametrize(
    "name",
    [
        "tool_calls_per_minute",
        "tool_threads",
        "running_per_user",
        "running",
        "read_entries",
        "commit_threads",
    ],
)
def test_none_of_these_is_too_few(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be 1 or more"):
        Limits(**wrong)
