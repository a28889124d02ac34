"""What the speed benchmark counts, asks of bundles and of llama.cpp's programs, and makes of their answers."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from arriero.runtimes.manifest import Manifest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA_CPP = "  -fa, --flash-attn <on|off|auto>\n  -d, --n-depth <n>\n  --repack <0|1>   (default: 1)\n"
IK_LLAMA_CPP = (
    "  -gp <pp,tg>   (default: )\n  -fa, --flash-attn <0|1>\n  -rtr, --run-time-repack <0|1>   (default: 0)\n"
)
BATCHED = """
main: n_kv_max = 2048, n_batch = 2048

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |     64 |    8 |   1536 |    0.751 |  1363.27 |    7.344 |   139.43 |    8.095 |   252.99 |
"""


@pytest.fixture(scope="module")
def benchmark():
    """A script of the benchmarks, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def timed(benchmark):
    return benchmark("timed_bundle")


def program(path: Path, shown: str, answer: str = "") -> Path:
    """A program that shows `shown` for help, gives `answer`, and keeps what it was asked beside itself."""
    path.write_text(f"""#!/bin/sh
if [ "$1" = --help ]; then cat <<'END'
{shown}
END
exit 1; fi
echo "$*" >> "{path}.asked"
cat <<'END'
{answer}
END
""")
    path.chmod(0o755)
    return path


def test_a_token_touches_the_decoder_and_its_experts_of_a_bundle(timed, workshop):
    exact, rounded = (Manifest.read(workshop / "bundles" / name) for name in ("fp32", "int8"))
    assert 0 < timed.touched_bytes(rounded) < timed.touched_bytes(exact)
    experts = sum(4 * np.prod(entry.shape) for name, entry in exact.weights.items() if ".experts." in name)
    model = exact.model
    left_out = experts * (1 - model.num_experts_per_tok / model.num_local_experts)
    whole = timed.decoder_bytes(exact.weights)
    assert whole - timed.touched_bytes(exact) == pytest.approx(left_out)


def test_a_token_reads_what_the_cache_holds_of_those_before_it(timed, workshop):
    manifest = Manifest.read(workshop / "bundles" / "fp32")
    model, chunk = manifest.model, manifest.model.attention_chunk_size
    chunked = [layer.attention for layer in model.layers].count("chunked")
    token = 2 * model.num_key_value_heads * model.head_dim * 4
    assert timed.cache_bytes(manifest, 0) == 0
    depth = 3 * chunk + 5
    assert timed.cache_bytes(manifest, depth) == token * (5 * chunked + depth * (len(model.layers) - chunked))


def test_a_bundle_answers_every_case_and_counts_what_it_takes(timed, workshop):
    bundle = timed.Bundle(workshop / "bundles" / "int8", 1)
    deep = timed.Case("decode", 3, depth=20, rows=2)
    for case in (timed.Case("prefill", 24), timed.Case("decode", 3), deep, deep):
        assert bundle.measure(case) > 0
    manifest = bundle.manifest
    held = 2 * timed.cache_bytes(manifest, 20)
    assert bundle.bytes_per_step(deep) == timed.touched_bytes(manifest, 2) + held > timed.touched_bytes(manifest) + held
    exact = Manifest.read(workshop / "bundles" / "fp32")
    share = exact.model.num_experts_per_tok / exact.model.num_local_experts
    matrices = [name for name in exact.weights if ".layers." in name and name.startswith("language_model.")]
    weights = sum(
        np.prod(exact.weights[name].shape) * (share if ".experts." in name else 1)
        for name in matrices
        if "norm" not in name and "router" not in name
    )
    # however the weights are stored, rounding to int8 leaves their number as it was
    assert bundle.operations(timed.Case("prefill", 24)) == pytest.approx(2 * 24 * weights)
    bundle.worker.process.kill()


@pytest.mark.parametrize(
    ("shown", "on", "off", "batched_on", "batched_off", "deep"),
    [
        (LLAMA_CPP, "--repack 1", "--repack 0", "--repack", "--no-repack", "-p 0 -n 8 -d 100"),
        (IK_LLAMA_CPP, "-rtr 1", "-rtr 0", "-rtr", None, "-p 0 -n 0 -gp 100,8"),
        ("  -fa, --flash-attn <0|1>\n  -d, --n-depth <n>\n", None, None, None, None, "-p 0 -n 8 -d 100"),
    ],
)
def test_llama_cpp_is_asked_in_every_setting_in_its_own_words(
    benchmark, timed, tmp_path, shown, on, off, batched_on, batched_off, deep
):
    peer = benchmark("llama_bench")
    path = program(tmp_path / "llama-bench", shown, 'some log\n[\n  {"avg_ts": 12.5}\n]')
    program(tmp_path / "llama-batched-bench", "", BATCHED)
    built = peer.Program(path)
    settings = [*built.settings(every=True)]
    assert len(settings) == (2 if on is None else 4)
    assert [*built.settings(every=False)] == settings[:1]
    one, eight = timed.Case("decode", 8, depth=100), timed.Case("decode", 8, depth=100, rows=8)
    for setting in settings:
        contender = peer.LlamaCpp(built, tmp_path / "a.gguf", 2, setting)
        assert [contender.measure(case) for case in (timed.Case("prefill", 512), one, eight)] == [12.5, 12.5, 139.43]
    asked = (tmp_path / "llama-bench.asked").read_text().splitlines()
    for setting, (prompt, decoded) in zip(settings, zip(asked[::2], asked[1::2], strict=True), strict=True):
        repack = on if setting.repack else off
        for words in (f"-fa {int(setting.flash)} ", *([] if repack is None else [f"{repack} "])):
            assert words in prompt
            assert words in decoded
        assert prompt.endswith("-p 512 -n 0")
        assert decoded.endswith(deep)
    for setting, words in zip(settings, (tmp_path / "llama-batched-bench.asked").read_text().splitlines(), strict=True):
        assert f"-npp 100 -ntg 8 -npl 8 -c 864 -fa {'on' if setting.flash else 'off'}" in words
        repack = batched_on if setting.repack else batched_off
        assert words.split()[-1] == (repack or ("on" if setting.flash else "off"))


def test_a_peer_that_fails_is_told_with_what_it_said(benchmark, timed, tmp_path, capfd):
    path = tmp_path / "llama-bench"
    path.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    path.chmod(0o755)
    program(tmp_path / "llama-batched-bench", "", "|    PP |     TG |\n|-------|--------|")  # too small a context
    peer = benchmark("llama_bench")
    built = peer.Program(path)
    (setting,) = built.settings(every=False)
    contender = peer.LlamaCpp(built, tmp_path / "a.gguf", 2, setting)
    assert np.isnan(contender.measure(timed.Case("prefill", 8)))
    assert "ended with 3:\nno such model" in capfd.readouterr().err
    assert np.isnan(contender.measure(timed.Case("decode", 8, rows=2)))
    assert "llama-batched-bench" in capfd.readouterr().err


def test_ratios_are_taken_within_rounds_against_the_best_of_each_program(benchmark, timed):
    speed, peer = benchmark("speed"), benchmark("llama_bench")
    ours = object.__new__(timed.Bundle)
    ours.bytes_per_step = lambda case: 1000
    contenders = {"ours": ours}
    for name, program in (("slow", 1), ("quick", 1), ("other", 2), ("broken", 2)):
        contenders[name] = object.__new__(peer.LlamaCpp)
        contenders[name].program = program
    bad = math.nan
    speeds = [(40.0, 30.0, 20.0, 80.0, bad), (30.0, 10.0, 20.0, 30.0, 99.0), (50.0, 11.0, 25.0, 25.0, 99.0)]
    rounds = [
        {"limits": {"read": 100_000.0, "dots": 1.0}, "decode": dict(zip(contenders, one, strict=True))}
        for one in speeds
    ]
    assert speed.best_peers(rounds, "decode", contenders) == ["quick", "other"]
    assert speed.best_peers(rounds, "decode", {"ours": ours}) == []
    shown = speed.table(rounds, contenders, timed.Case("decode", 8))
    cells = {column.header: [*column.cells] for column in shown.columns}
    assert [*cells] == ["", "tokens/s", "÷ ours", "÷ quick", "÷ other", "of the bandwidth"]
    assert cells["tokens/s"] == ["40.0", "11.0", "20.0", "30.0", "failed"]
    same = "1.00 (1.00 to 1.00)"
    assert cells["÷ quick"] == ["2.00 (1.50 to 2.00)", "0.50 (0.44 to 1.50)", same, "1.50 (1.00 to 4.00)", ""]
    assert cells["÷ other"][0] == "1.00 (0.50 to 2.00)"
    assert cells["of the bandwidth"] == ["40%", "", "", "", ""]
