"""`arriero parity`, `run`, `inspect` and `compare`: what is done with published bundles."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.errors import ArrieroError
from arriero.export.cli.options import (
    SEED,
    Adapters,
    BundleFolder,
    Context,
    Draft,
    ForcedRouting,
    Json,
    Memory,
    SampleCount,
    Set,
    Speculate,
    Threads,
    err,
    out,
    print_json,
)

if TYPE_CHECKING:
    from arriero.export.build_file.schema import Cases
    from arriero.export.proof.prove import Proofs
    from arriero.runtimes.processor.pictures import ImageLike


def parity(
    bundle: BundleFolder,
    record: Annotated[
        list[Path] | None,
        typer.Option(
            help="The folder of a reference record, for a bundle that brings none, or in the place of its own; give "
            "the option again for those of adapters."
        ),
    ] = None,
    recorded: Annotated[bool, typer.Option("--recorded", help="Show the build's own report; measure nothing.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint, as a build file names it: compare with its PyTorch reference itself, over the whole "
            "vocabulary."
        ),
    ] = None,
    adapter: Adapters = None,
    data: Set = None,
    samples: SampleCount = None,
    seed: Annotated[int | None, typer.Option(help="Which held-out prompts, with --against.", min=0)] = None,
    forced_routing: ForcedRouting = False,
    exact: Annotated[
        Path | None,
        typer.Option(
            help="An exact bundle of the same checkpoint (profile fp32), to run with each token sent to the experts "
            "that the measured bundle chose: tells what that routing alone costs."
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML here, one test case per judged row.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML page here.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder for the proof of a bundle that was built elsewhere and cannot be written to."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on this machine and judge it; exit code 1 when a row is below its threshold.

    It is measured against its reference record, what the PyTorch reference says of the held-out prompts, and needs
    neither PyTorch nor the checkpoint: router agreement per layer, logits, top tokens, answers and task accuracy, in
    text and about images. --recorded shows what the build measured instead.

    A bundle that was built for another device than the machine that built it is proven by this, on the device: where it
    passes, the proof is written into it, or with --output into a folder whose files complete it.

    A bundle that switches between adapters is measured with each of them, by the record of the model that has it
    merged; --against with --adapter measures the bundle with the adapter of that folder alone.

    --against CHECKPOINT compares with the PyTorch reference itself, and refuses a record that says otherwise than the
    checkpoint; --set, --samples or --seed then choose other prompts than the record's.

    --forced-routing tells rounded values and flipped routing apart: the bundle runs once more with the experts that the
    reference chose. With --against, the reference also runs with those that the bundle chose; without PyTorch, an exact
    bundle does, with --exact. In CI:

        arriero parity bundles/portable-int8 --junit parity.xml
    """
    from arriero.export.cli.show_parity import show_parity
    from arriero.runtimes.proof.junit import Suite, write_junit
    from arriero.runtimes.proof.pages import write_html

    other = (data, samples, seed) != (None, None, None)
    if recorded and (record or against or forced_routing or exact):
        remedy = "Leave out --record, --against, --forced-routing and --exact, or --recorded"
        raise ArrieroError("--recorded measures nothing", remedy=remedy)
    if exact and against:
        remedy = "Leave out --exact: --forced-routing runs the reference with the bundle's routing"
        raise ArrieroError("--against brings an exact model of its own", remedy=remedy)
    if other and against is None:
        what = "--set, --samples and --seed choose prompts that the reference record does not hold"
        raise ArrieroError(what, remedy="Add --against with the checkpoint")
    if adapter and against is None:
        raise ArrieroError("--adapter belongs to a checkpoint", remedy="Add --against with the checkpoint")
    if output and (recorded or against):
        raise ArrieroError("--output takes a proof by the bundle's record", remedy="Leave out --recorded and --against")
    if other and record:
        raise ArrieroError("--record brings its own prompts", remedy="Leave out --set, --samples and --seed")
    if against and record and len(record) > 1:
        raise ArrieroError("a checkpoint is compared by one record", remedy="Give --record once")
    chosen = _held_out(data, samples, seed) if other else None
    start = time.monotonic()
    try:
        if recorded:
            proofs = _recorded(bundle)
        elif against is None:
            proofs = _measure(bundle, record or [], output, forced_routing, exact)
        else:
            proofs = _measure_against(bundle, record or [], against, adapter or [], chosen, forced_routing)
    except ArrieroError as error:
        if junit:
            write_junit([Suite(bundle.name, seconds=time.monotonic() - start, error=str(error))], junit)
        raise
    seconds = time.monotonic() - start
    if junit:
        labels = next(iter(proofs.values())).labels
        write_junit([Suite(labels.get("bundle", bundle.name), proofs, seconds)], junit)
    for name, report in proofs.items():
        if html:
            write_html(report, html if name is None else html.with_stem(f"{html.stem}-{name}"))
        if not as_json:
            show_parity(report, out)
    if as_json:
        own = next(iter(proofs.values())).to_dict()
        beside = {name: report.to_dict() for name, report in proofs.items() if name is not None}
        print_json(own if None not in proofs or not beside else {**own, "adapters": beside})
    if any(report.failed for report in proofs.values()):
        raise typer.Exit(1)


def _recorded(bundle: Path) -> Proofs:
    from arriero.runtimes.integrity import check_proven, open_manifest
    from arriero.runtimes.manifest import proof_path
    from arriero.runtimes.proof.report import read_json

    manifest = open_manifest(bundle)
    check_proven(manifest)
    return {adapter: read_json(bundle / proof_path(adapter, "parity.json")) for adapter in manifest.records}


def _measure(
    bundle: Path, records: list[Path], output: Path | None, forced_routing: bool, exact: Path | None
) -> Proofs:
    from arriero.export.cli.progress import Progress
    from arriero.export.proof.prove import prove_bundle

    with Progress(err) as watch:
        return prove_bundle(bundle, records, watch, output, forced_routing, exact)


def _measure_against(
    bundle: Path, records: list[Path], model: str, adapters: list[Path], other: Cases | None, forced_routing: bool
) -> Proofs:
    from arriero.export.build_file.locate import resolve_model
    from arriero.export.cli.progress import Progress
    from arriero.export.proof.against import prove_against
    from arriero.graphs.checkpoint import Checkpoint

    with Progress(err) as watch:
        record = records[0] if records else None
        checkpoint = Checkpoint.open(resolve_model(model, Path.cwd()), adapters)
        report = prove_against(bundle, checkpoint, record, other, watch, forced_routing)
        return {report.labels.get("adapter"): report}


def _held_out(data: str | None, samples: int | None, seed: int | None) -> Cases:
    from arriero.export.build_file.schema import EMBEDDED, Cases

    seed = SEED if seed is None else seed
    if data is None:
        return Cases(set=EMBEDDED, samples=samples or 200, seed=seed)
    if not Path(data).exists():
        raise ArrieroError("there is no such data set", where=data, expected="a JSONL file, or a folder of images")
    return Cases(set=str(Path(data).absolute()), samples=samples, seed=seed)


def run(
    bundle: BundleFolder,
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image to ask about; give the option again for more images.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video to ask about, read as frames; shown after the images.")
    ] = None,
    document: Annotated[
        list[Path] | None, typer.Option(help="A PDF to ask about, each page a picture; shown after the videos.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames to take of each video, evenly spaced.", min=1)] = 4,
    max_tokens: Annotated[int | None, typer.Option(help="End the answer after so many tokens.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher draws more freely.", min=0.0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens up to this share.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least so probable as this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens of prompt and answer.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logits of the answer's tokens, once.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, as often as each came.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End the answer with this token.")] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Control tokens in the prompt are what they say, and <|image|> places a picture."
        ),
    ] = False,
    show_special_tokens: Annotated[
        bool, typer.Option("--show-special-tokens", help="Leave control tokens in the answer.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: each token's log-probability, and so many likeliest.", min=0)
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="The bundle's adapter to answer with, by its name.")] = None,
    threads: Threads = None,
    memory: Memory = None,
    context: Context = None,
    speculate: Speculate = 0,
    draft: Draft = None,
    as_json: Json = False,
) -> None:
    """Ask a bundle and stream its answer. Pictures come before the text.

    arriero run bundles/portable-int8 "What is 17 + 25?"

    arriero run bundles/portable-int8 "Describe the image." --image models/example.png

    arriero run bundles/portable-int8 "Which way does it move?" --video clip.mp4

    arriero run bundles/portable-int8 "What does it ask for?" --document form.pdf
    """
    from rich.markup import escape

    from arriero.export.cli.show_reads import describe_drafts, describe_reads
    from arriero.runtimes.api import load
    from arriero.runtimes.backend import no_vision
    from arriero.runtimes.manifest import Manifest
    from arriero.runtimes.processor.documents import read_document
    from arriero.runtimes.processor.video import read_video

    if logprobs is not None and not as_json:
        raise ArrieroError("--logprobs is shown as JSON only", remedy="Add --json")
    text = sys.stdin.read() if prompt == "-" else prompt
    pictures: list[ImageLike] = list(image or ())
    with load(
        bundle, threads, adapter=adapter, memory=memory, speculate=speculate, draft=draft, context=context
    ) as session:
        if (video or document) and session.spec.vision is None:
            raise no_vision()
        most = session.processor.most_pictures(session.context)
        for path in video or ():
            pictures += read_video(path, frames, most - len(pictures))
        for path in document or ():
            pictures += read_document(path, most=most - len(pictures))
        stream = session.generate(
            session.encode(text, pictures, special_tokens=special_tokens),
            stream=True,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop or (),
            stop_token_ids=stop_token_id or (),
            skip_special_tokens=not show_special_tokens,
            logprobs=logprobs,
        )
        for piece in stream:
            if not as_json:
                print(piece, end="", flush=True)
        result, stats = stream.result, session.stats()
    reads = stats.experts
    if as_json:
        print_json(asdict(result) | ({"reads": asdict(reads)} if reads.layers else {}))
        return
    print()
    rate = f", {1 / result.token_s:.1f} tokens/s" if result.token_s else ""
    summary = (
        f"{result.prompt_tokens} prompt tokens, TTFT {1000 * result.ttft_s:.0f} ms, {len(result.token_ids)} tokens"
    )
    err.print(f"[dim]{summary}{rate}{describe_drafts(stats)}, ended by {result.finish_reason}[/]", highlight=False)
    if reads.layers:
        err.print(f"[dim]{escape(describe_reads(reads))}[/]", highlight=False)
    manifest = Manifest.read(bundle)
    if manifest.synthetic:
        err.print(f"[yellow]{escape(str(manifest.source))}[/]", highlight=False)


def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Say what a bundle holds: model, target, hash chain, weights by scheme, expert coverage, parity.

    Every file is hashed and compared with the manifest on the way.
    """
    from arriero.export.cli.show_bundle import describe_bundle, show_bundle

    described = describe_bundle(bundle)
    if as_json:
        print_json(described)
    else:
        show_bundle(described, out)


def compare(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders, all made from one checkpoint.")],
    against: Annotated[str, typer.Option(help="The checkpoint that they were made from, as the build file names it.")],
    adapter: Adapters = None,
    data: Set = None,
    samples: SampleCount = None,
    seed: Annotated[int, typer.Option(help="Which held-out prompts.", min=0)] = SEED,
    forced_routing: ForcedRouting = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a plot of quality against size.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure bundles side by side: size, tokens/s, KL, top tokens, routers, task accuracy with its interval.

    arriero compare bundles/portable-fp32 bundles/portable-int4 --against models/chasqui --html compare.html
    """
    from arriero.export.build_file.locate import resolve_model
    from arriero.export.cli.progress import Progress
    from arriero.export.proof import compare as comparison

    cases, model = _held_out(data, samples, seed), resolve_model(against, Path.cwd())
    with Progress(err) as watch:
        lines = comparison.compare_bundles(bundles, model, adapter or [], cases, threads, watch, forced_routing)
    asked = {"set": Path(cases.set).name, "samples": lines[0].cases, "seed": seed}
    if html:
        labels = {"checkpoint": against, "held-out prompts": asked["set"], "how many": asked["samples"], "seed": seed}
        comparison.write_page(lines, {name: str(value) for name, value in labels.items()}, html)
    if as_json:
        print_json(comparison.to_json(lines, {"against": against, **asked}))
    else:
        from arriero.export.cli.show_comparison import show_comparison

        show_comparison(lines, out)
