"""How fast memory and drive are read: figures that a machine can have, and nothing left behind."""

from __future__ import annotations

import os

from arriero.export.machine import read_speed
from arriero.export.machine.read_speed import drive_speed, measure_read_speed


def test_a_folder_that_is_not_there_yet_is_measured_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(read_speed, "SECONDS", 0.1)
    monkeypatch.setattr(read_speed, "MEMORY_BYTES", 8 << 20)
    monkeypatch.setattr(read_speed, "FILE_BYTES", 8 << 20)
    speed = measure_read_speed(tmp_path / "output" / "bundles")
    assert 1e8 < speed.memory < 1e13
    assert 1e6 < speed.drive < 1e12
    assert list(tmp_path.iterdir()) == []


def test_reads_through_the_systems_cache_say_why(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(read_speed.PIECE * 2))
    monkeypatch.setattr(read_speed, "SECONDS", 0.05)
    monkeypatch.setattr(read_speed, "open_direct", lambda path: (os.open(path, os.O_RDONLY), "none here"))
    rate, reason = drive_speed(file)
    assert rate > 0
    assert reason == "none here"
