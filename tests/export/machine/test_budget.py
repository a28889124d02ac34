"""Sizes in text, what the machine has free (against fake /proc and /sys trees), and refusals by how much."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.machine.budget import (
    PeakMemory,
    available_memory,
    check_budget,
    free_disk,
    release_memory,
    total_memory,
)
from arriero.sizes import human_bytes, parse_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("2 GB", 2 * 10**9),
        ("1.5MiB", 3 << 19),
        ("3TB", 3 * 10**12),
        ("2000000", 2_000_000),
        (1 << 20, 1 << 20),
        ("2097152B", 2 << 20),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8G", "-8GiB", "8GiBs", "8,5GiB", "1e9", True, "0x10", "8 Gi B"])
def test_no_sizes(text):
    with pytest.raises(ArrieroError, match=r"is not a size; expected a size such as 8GiB\. Write a number and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize("text", [0, 8, "8", "1KB", -5])
def test_sizes_too_small_to_be_meant(text):
    with pytest.raises(ArrieroError, match=r"is less than 1 MiB; is the unit missing\?"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023.9 * 1024, "1 MiB"),
        (217.3 * GIB, "217 GiB"),
        (1 << 50, "1,024 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_sizes_for_people(count, text):
    assert human_bytes(count) == text


def machine(root, cgroup="", **files):
    tree = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n", "proc/self/cgroup": cgroup}
    for path, text in {**tree, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_memory_without_limits(tmp_path):
    machine(tmp_path)
    assert (available_memory(tmp_path), total_memory(tmp_path)) == (8 * GIB, 16 * GIB)


def test_cgroup_v2_counts_droppable_file_pages_as_free(tmp_path):
    files = {
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon {GIB}\nfile 5\ninactive_file {2 * GIB}\n",
    }
    machine(tmp_path, "0::/a/b\n", **files)
    assert (available_memory(tmp_path), total_memory(tmp_path)) == (3 * GIB, 4 * GIB)


def test_cgroup_v1_of_a_container_whose_path_is_not_visible(tmp_path):
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 0\n",
    }
    machine(tmp_path, "5:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n", **files)
    assert available_memory(tmp_path) == GIB + 7
    assert total_memory(tmp_path) == 2 * GIB


def test_cgroup_v1_without_a_limit(tmp_path):
    machine(tmp_path, "3:memory:/\n", **{"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert available_memory(tmp_path) == 8 * GIB


def test_a_system_without_proc(tmp_path):
    assert (available_memory(tmp_path), total_memory(tmp_path)) == (None, None)


def test_this_machine():
    free, total = available_memory(), total_memory()
    assert free is None or (total is not None and 0 < free <= total)


def test_free_disk_of_a_folder_that_is_yet_to_be_made(tmp_path):
    assert free_disk(tmp_path / "a" / "b") > 0


def test_what_fits_passes():
    check_budget("memory", GIB, budget=GIB, available=GIB, where="b.yaml: budgets.host_memory")
    check_budget("memory", GIB, budget=None, available=None, where="b.yaml: budgets.host_memory")


def test_a_budget_that_is_too_small_says_by_how_much():
    with pytest.raises(ArrieroError) as caught:
        check_budget("memory", 3 * GIB, budget=GIB, available=0, where="b.yaml: budgets.host_memory")
    text = str(caught.value)
    assert text.startswith(
        "b.yaml: budgets.host_memory: the build needs about 3 GiB of memory, 2 GiB more than allowed"
    )
    assert "expected at most 1 GiB. Raise budgets.host_memory, or choose a smaller profile" in text
    assert caught.value.exit_code == 2


def test_a_machine_that_is_too_small():
    with pytest.raises(MachineLacks) as caught:
        check_budget("disk space", 3 * GIB, budget=None, available=GIB, where="b.yaml: budgets.disk", place="/data")
    assert re.match(
        r"/data has 1 GiB of disk space free, 2 GiB too little; expected about 3 GiB\. Free", str(caught.value)
    )
    assert caught.value.exit_code == 3


def test_peak_memory_sees_what_was_given_back():
    with PeakMemory(interval=0.005) as before:
        pass
    with PeakMemory(interval=0.005) as peak:
        block = np.ones(64 << 20, np.uint8)
        time.sleep(0.1)
        del block
    assert peak.anonymous - before.anonymous > 48 << 20
    assert peak.resident >= peak.anonymous


def test_the_programs_that_a_stage_runs_count_in_its_peak():
    script = "import time; held = bytearray(150 << 20); time.sleep(1)"
    with PeakMemory() as alone:
        pass
    with PeakMemory() as memory:
        subprocess.run(["sh", "-c", f"{sys.executable} -c '{script}'; true"], check=True)
    assert memory.anonymous - alone.anonymous > 150 << 20


def test_memory_that_was_let_go_is_given_back():
    held = [bytearray(100_000) for _ in range(1000)]  # small enough to come from the heap
    last = bytearray(100)
    with PeakMemory() as before:
        pass
    del held
    release_memory()
    with PeakMemory() as after:
        pass
    assert before.anonymous - after.anonymous > 80_000_000
    assert last is not None
