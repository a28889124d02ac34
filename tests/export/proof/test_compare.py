"""The comparison's own figures and its page; what it measures is parity's, tested there."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from rich.console import Console

from arriero.export.cli.show_comparison import show_comparison
from arriero.export.proof.compare import Compared, decoder_bits, to_json, write_page
from arriero.runtimes.cpu import describe_processor
from arriero.runtimes.manifest import StoredWeight
from arriero.runtimes.proof.plots import size_and_error

LAYER = "language_model.model.layers.0"


def line(name: str, size: int, kl: float) -> Compared:
    return Compared(
        *(name, name, "onnxruntime", "int4", size, size // 2, 4.5, "int8", 512, 31.4),
        *(kl, kl / 10, kl / 2, 0.5, 0.4, 0.99, 0.98, 0.5, 0.48, (0.385, 0.577), 100),
    )


def stored(dtype: str, *shape: int, scheme: str = "exact") -> StoredWeight:
    return StoredWeight(dtype, shape, scheme, ("text.safetensors",))


def test_bits_count_scales_but_not_routers_and_tables() -> None:
    weights = {
        f"{LAYER}.self_attn.q_proj.weight.packed": stored("U8", 64, 2, 16, scheme="int4 block 32 gptq"),
        f"{LAYER}.self_attn.q_proj.weight.scales": stored("F32", 64, 2, scheme="int4 block 32 gptq"),
        f"{LAYER}.feed_forward.router.weight": stored("F32", 4, 64),
        f"{LAYER}.input_layernorm.weight": stored("F32", 64),
        "language_model.lm_head.weight": stored("F32", 160, 64),
    }
    assert decoder_bits(weights) == 5.0
    scales = stored("F32", 64, scheme="fp8 per channel")
    byte = {
        f"{LAYER}.self_attn.q_proj.weight.packed": stored("F8_E4M3", 64, 64, scheme="fp8 per channel"),
        f"{LAYER}.self_attn.q_proj.weight.scales": scales,
    }
    assert decoder_bits(byte) == 8.5
    static = {**byte, f"{LAYER}.self_attn.q_proj.weight.multiplier": scales}
    assert decoder_bits(static) == 9.0
    assert decoder_bits({f"{LAYER}.self_attn.q_proj.weight": stored("F32", 64, 64)}) == 32.0


def test_the_page_stands_alone_and_shows_every_bundle(tmp_path: Path) -> None:
    lines = [line("small", 5 << 20, 0.02), line("large <&>", 30 << 20, 1e-13)]
    write_page(lines, {"checkpoint": "c"}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert describe_processor() in page
    for wanted in (
        "small",
        "large &lt;&amp;&gt;",
        "<svg",
        "0.02 ± 0.002",
        "48.0 % (38.5 to 57.7)",
        "Below 1e-06 and drawn there: large",
        "onnxruntime 1.",
        "40.00 %",
        "Routing forced",
        "50.00 %",
        "int8, 512 B",
    ):
        assert wanted in page
    for banned in ("<script", "http://", "https://", "{%"):
        assert banned not in page
    assert len(to_json(lines, {"seed": 1})["bundles"]) == 2
    console = Console(width=80, record=True)
    show_comparison(lines, console)
    assert "31.4" in console.export_text()


def test_labels_of_bundles_that_are_close_do_not_cover_each_other() -> None:
    plot = size_and_error({"one": (9.0, 0.02), "two": (9.1, 0.02), "exact": (33.0, 0.0)})
    assert plot is not None
    heights = {
        text.text: float(text.attrib["y"])
        for text in ET.fromstring(plot.svg).iter("text")
        if text.text in ("one", "two")
    }
    assert abs(heights["one"] - heights["two"]) >= 12.9


def test_no_points_no_plot() -> None:
    assert size_and_error({}) is None
