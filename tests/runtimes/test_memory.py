"""What the machine has free, against fake /proc and /sys trees; and arrays that take memory only where it is used."""

import mmap

import numpy as np
import pytest

from arriero.runtimes.lazy_memory import give_back, lazy_zeros
from arriero.runtimes.memory import available_memory, total_memory

GIB = 1 << 30


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


def resident():
    """Bytes of this process that no file stands behind."""
    with open("/proc/self/statm") as statm:
        _, pages, shared, *_ = map(int, statm.read().split())
    return (pages - shared) * mmap.PAGESIZE


def test_zeros_take_memory_where_they_are_written_until_they_are_given_back():
    before = resident()
    rows = lazy_zeros((64, 1 << 20), np.float32)  # 4 MiB a row
    assert resident() - before < 8 << 20
    rows[3] = 1
    rows[5, :7] = 2
    assert 4 << 20 <= resident() - before < 12 << 20
    give_back(rows[3])
    assert resident() - before < 4 << 20
    assert not rows[3].any()
    assert rows[5, :8].tolist() == [2.0] * 7 + [0.0]
    rows[3] = 4
    assert rows[3].min() == rows[3].max() == 4


def test_what_shares_a_page_with_others_is_not_given_back():
    rows = lazy_zeros((3, 1000), np.float32)
    rows[:] = 7
    give_back(rows[1])
    assert rows[0].min() == rows[2].min() == 7
    with pytest.raises(ValueError, match="no part of a `lazy_zeros`"):
        give_back(np.zeros(4))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), ()])
def test_empty_and_single_arrays_are_arrays(shape):
    assert lazy_zeros(shape, np.int8).shape == shape
