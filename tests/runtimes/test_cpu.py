"""What a processor can do is read where the system tells it, and a bundle that needs more is refused."""

import platform
from pathlib import Path

import pytest

from arriero.errors import MachineLacks
from arriero.runtimes import cpu
from arriero.runtimes.cpu import architecture, check_features, cpu_features


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
