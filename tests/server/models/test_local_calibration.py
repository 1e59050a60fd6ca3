"""What is measured of tools outlives the process, and a broken file costs nothing but time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from creche_server.models.local_calibration import Calibrations

NONE = Path("there is no such file")


async def test_what_is_measured_is_known_at_the_next_start_of_the_same_model(tmp_path: Path):
    file = tmp_path / "measured.json"
    assert await Calibrations("m", file, NONE).get("tools") is None
    await Calibrations("m", file, NONE).put("tools", {"a": 1.5})
    assert await Calibrations("m", file, NONE).get("tools") == {"a": 1.5}
    assert await Calibrations("m", file, NONE).get("other tools") is None
    assert await Calibrations("n", file, NONE).get("tools") is None
    assert os.listdir(tmp_path) == ["measured.json"]  # and nothing half written


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"x": {"a": "b"}}', b"\xff"])
async def test_a_file_that_is_none_of_ours_is_measured_over(tmp_path: Path, data: bytes):
    file = tmp_path / "measured.json"
    file.write_bytes(data)
    known = Calibrations("m", file, NONE)
    assert await known.get("tools") is None
    await known.put("tools", {"a": 1.5})
    assert await Calibrations("m", file, NONE).get("tools") == {"a": 1.5}


async def test_a_file_that_cannot_be_written_is_done_without(tmp_path: Path):
    known = Calibrations("m", tmp_path / "no folder" / "measured.json", NONE)
    await known.put("tools", {"a": 1.5})
    assert await known.get("tools") == {"a": 1.5}


async def test_the_oldest_are_forgotten(tmp_path: Path):
    known = Calibrations("m", None, NONE)
    for i in range(33):
        await known.put(str(i), {"a": 1.5})
    assert await known.get("0") is None
    assert await known.get("1") is not None
