"""What a processor can do is read where the system tells it, and a bundle that needs more is refused."""

import platform
from pathlib import Path

import pytest

from arriero.errors import MachineLacks
from arriero.runtimes import cpu
from arriero.runtimes.cgroup import cpu_quota
from arriero.runtimes.cpu import architecture, check_features, cpu_features, usable_cores


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
def test_features_are_the_systems_own():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert cpu_features() == set(flags.partition(":")[2].split())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({16: 1 << 1 | 1 << 20, 26: 0}, {"asimd", "asimddp"}),
        ({16: 1 << 1 | 1 << 8, 26: 1 << 13 | 1 << 14}, {"asimd", "atomics", "i8mm", "bf16"}),
    ],
)
def test_arm_features_come_from_the_kernels_words(monkeypatch, words, wanted):
    class Library:
        @staticmethod
        def getauxval(kind):
            return words[kind]

    monkeypatch.setattr(cpu, "architecture", lambda: "aarch64")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: Library)
    assert cpu_features() == wanted


def test_missing_features_are_named_together(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset({"avx", "avx2"}))
    check_features(("avx2",), "here")
    with pytest.raises(MachineLacks, match=r"^here: .*avx512_vnni, avx512f, which this one lacks") as caught:
        check_features(("avx2", "avx512f", "avx512_vnni"), "here")
    assert caught.value.exit_code == 3


def test_nothing_is_refused_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_features", frozenset)
    check_features(("avx512f",), "here")


def test_architectures_have_one_name_each():
    assert architecture("AMD64") == "x86_64"
    assert architecture("arm64") == "aarch64"
    assert architecture("riscv64") == "riscv64"


@pytest.mark.parametrize(
    ("files", "quota", "of_eight"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "20000 100000\n"}, 0.2, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "6400000 100000\n"}, 64.0, 8),
        # a container that sees its own group as the root
        ({"proc/self/cgroup": "0::/docker/77\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4.0, 4),
        (
            {
                "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
            3,
        ),
        ({}, None, 8),
    ],
)
def test_threads_keep_within_the_groups_quota(tmp_path, monkeypatch, files, quota, of_eight):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpu_quota(tmp_path) == quota
    assert usable_cores(tmp_path) == of_eight
