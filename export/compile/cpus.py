"""The processors that a target may be compiled for: friendly names, or an LLVM triple with a CPU and features."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.cpu import architecture, cpu_features

X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"
NATIVE = "native"
# Best first within an architecture: `native` is the first that this machine can run.
NAMED: dict[str, str] = {
    "x86-64-v4-vnni": f"{X86} x86-64-v4 +avx512vnni",
    "x86-64-v3": f"{X86} x86-64-v3",
    "x86-64": f"{X86} x86-64",
    "arm64-v8.6-i8mm": f"{ARM} generic +dotprod +i8mm",
    "arm64-v8.2-dotprod": f"{ARM} generic +dotprod",
    "arm64-v8": f"{ARM} generic",
    "raspberry-pi-5": f"{ARM} cortex-a76",
    "graviton3": f"{ARM} neoverse-v1",
    "jetson-orin-cpu": f"{ARM} cortex-a78ae",
}
# What generated code may use: LLVM's name of a feature, and Linux's where that is another. Features that LLVM never
# uses unasked (cryptography, system registers) are left out, so that a processor without them is not refused.
FEATURES = """
    sse3=pni ssse3 sse4.1=sse4_1 sse4.2=sse4_2 popcnt avx avx2 bmi=bmi1 bmi2 fma f16c lzcnt=abm movbe avxvnni=avx_vnni
    avx512f avx512bw avx512cd avx512dq avx512vl avx512vbmi avx512ifma
    avx512vnni=avx512_vnni avx512bf16=avx512_bf16 avx512fp16=avx512_fp16
    neon=asimd dotprod=asimddp fullfp16=asimdhp rdm=asimdrdm lse=atomics crc=crc32 rcpc=lrcpc
    complxnum=fcma jsconv=jscvt i8mm bf16 sve sve2
"""
LINUX_NAMES = {word.partition("=")[0]: word.rpartition("=")[2] for word in FEATURES.split()}
WORDS = re.compile(r"(?P<triple>(?P<arch>x86_64|aarch64)-[\w-]+)( (?P<cpu>[\w.-]+))?(?P<features>( \+[\w.-]+)*)")


@dataclass(frozen=True)
class Cpu:
    """A processor to compile for."""

    arch: str
    triple: str
    cpu: str
    features: tuple[str, ...]  # LLVM's names, beyond what the CPU brings

    def __str__(self) -> str:
        return " ".join((self.triple, self.cpu, *(f"+{name}" for name in self.features)))

    @property
    def llvm(self) -> dict[str, Any]:
        """The configuration of TVM's `llvm` target."""
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.cpu,
            "mattr": [f"+{name}" for name in self.features],
        }


def parse_cpu(text: str) -> Cpu:
    """Read a friendly name, or `<triple> [<cpu>] [+feature ..]`. Raises ArrieroError with what is known."""
    if text == NATIVE:
        text = native()
    words = WORDS.fullmatch(NAMED.get(text, text))
    if words is None:
        raise ArrieroError(
            f"there is no processor {text!r}",
            expected=f"one of {NATIVE}, {', '.join(NAMED)}, or an LLVM triple such as `{ARM} cortex-a72 +crc`",
        )
    if "linux" not in words["triple"].split("-"):
        raise ArrieroError(
            f"{words['triple']!r} is not a triple of Linux, for which alone kernels are compiled",
            expected=f"one of {X86}, {ARM}",
        )
    features = tuple(word.removeprefix("+") for word in words["features"].split())
    return Cpu(words["arch"], words["triple"], words["cpu"] or "generic", features)


def native() -> str:
    """The best of the friendly names that this machine can run."""
    have, arch = cpu_features(), architecture()
    for name, needs in NEEDS.items():
        if parse_cpu(name).arch == arch and needs <= have:
            return name
    raise MachineLacks(
        f"no processor we know by name fits this machine ({arch})", remedy="Name one by its LLVM triple in `cpu`"
    )


V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
# What the generations of an architecture need in Linux's names; the named boards are for cross-compiling.
NEEDS: dict[str, set[str]] = {
    "x86-64-v4-vnni": {*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"},
    "x86-64-v3": V3,
    "x86-64": set(),
    "arm64-v8.6-i8mm": {"asimd", "asimddp", "i8mm"},
    "arm64-v8.2-dotprod": {"asimd", "asimddp"},
    "arm64-v8": {"asimd"},
}
