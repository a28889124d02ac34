"""The `arriero` command: a thin skin over library calls. Exit codes: 0 ok, 1 parity failed, 2 user, 3 machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from arriero.errors import ArrieroError, MachineLacks
from arriero.version import __version__

if TYPE_CHECKING:
    from arriero.export.build_file.schema import Cases
    from arriero.runtimes.processor.pictures import ImageLike
    from arriero.runtimes.proof.report import ParityReport

app = typer.Typer(
    name="arriero",
    help=(
        "Takes Llama 4 mixture-of-experts checkpoints to bundles that run at the edge, with measured proof that they "
        "still compute what the PyTorch reference computes.\n\n"
        "A first session: [bold]arriero doctor[/] says what this machine can do, [bold]arriero plan[/] what a build "
        "would do and cost, [bold]arriero build[/] does it, and "
        "[bold]arriero run bundles/portable-int8 'What is 17 + 25?'[/] "
        "asks the result a question.\n\n"
        "Exit codes: 0 ok, 1 parity or quality below its threshold, 2 a mistake in what was given, 3 the machine lacks "
        "something."
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)
SEED = 29  # of the held-out prompts

profiles_app = typer.Typer(
    name="profiles", help="Say what number formats there are, and why each tensor has its own.", no_args_is_help=True
)
app.add_typer(profiles_app)

ProfileName = Annotated[str, typer.Argument(help="A shipped profile, a profile file, or a published bundle.")]
BuildFile = Annotated[Path, typer.Argument(help="The build file.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text for people.")]
BundleFolder = Annotated[Path, typer.Argument(help="A bundle folder that `arriero build` published.")]
Set = Annotated[
    str | None,
    typer.Option(
        "--set", help="A JSONL file or folder of images with the held-out prompts; the embedded ones if none."
    ),
]
SampleCount = Annotated[
    int | None,
    typer.Option("--samples", help="How many; 200 of the embedded prompts, all of a set's, when left out.", min=1),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads to use; every core when left out.", min=1)]


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


@app.command()
def plan(build_file: BuildFile = Path("build.yaml"), as_json: Json = False) -> None:
    """Say what a build would do and cost, without touching anything.

    Shows the stages (done or to do), the bytes of each bundle by number format, peak memory and disk against the
    budgets, and what context costs: KV cache bytes at 8k, 128k, 1M and 10M tokens for each cache format.
    """
    from arriero.export.build_file.read import load_build
    from arriero.export.cli.show_plan import show_plan
    from arriero.export.pipeline.plan import make_plan

    planned = make_plan(load_build(build_file))
    if as_json:
        _print_json(planned.to_json())
    else:
        show_plan(planned, out)
    planned.check_budgets(str(build_file))


@app.command()
def build(
    build_file: BuildFile = Path("build.yaml"),
    dump_graphs: Annotated[
        Path | None,
        typer.Option(help="Keep each graph that is lowered here after every phase, to find the one that goes wrong."),
    ] = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="End with exit code 3 where a bundle is for another device.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build every bundle that the build file names, and publish those that pass parity.

    Steps that are done are not done again: kill a build at any point and give the same command to go on; an unchanged
    build does nothing. A bundle appears under its name only once its parity against the PyTorch reference has passed;
    otherwise the report stays beside it as an HTML page and the exit code is 1. A bundle for a device that this machine
    is not is published unproven, and `arriero parity` on the device completes it.
    """
    from arriero.export.build_file.read import load_build
    from arriero.export.cli.progress import ProgressBars
    from arriero.export.pipeline.build import Build

    config = load_build(build_file)
    with ProgressBars(err) as watch:
        bundles = Build(config, str(build_file), watch, dump_graphs).run()
    unproven = {str(bundle.folder): bundle.device for bundle in bundles if bundle.device is not None}
    if as_json:
        _print_json({"bundles": [str(bundle.folder) for bundle in bundles], "unproven": unproven})
    for bundle in bundles if not as_json else ():
        state = "[green]published[/]" if bundle.device is None else "[yellow]published, unproven[/]"
        out.print(f"{state} {_escape(str(bundle.folder))}", highlight=False, soft_wrap=True)
        if bundle.device is not None:
            advice = f"  run `arriero parity {bundle.folder}` on {bundle.device}: it measures the bundle there"
            out.print(_escape(advice), highlight=False, soft_wrap=True)
    if unproven and require_proof:
        raise MachineLacks(
            f"{', '.join(unproven)}: not proven, because this machine cannot run what was built",
            expected=", ".join(sorted(set(unproven.values()))),
            remedy="Run `arriero parity` on such a machine, or leave out --require-proof",
        )


@app.command()
def calibrate(build_file: BuildFile = Path("build.yaml"), as_json: Json = False) -> None:
    """Run the build file's calibration alone, and show what it saw: tokens per expert and activation ranges.

    What it finds lies where `arriero build` looks for it, so that a build goes on from here; killed, the same command
    goes on after the last finished layer. Experts that too few tokens reach are named: give the set more samples, or
    other ones. Samples come from `calibration.set`: `embedded`, a JSONL file, or a folder of images.
    """
    from arriero.export.build_file.read import load_build
    from arriero.export.cli.progress import ProgressBars
    from arriero.export.cli.show_calibration import show_calibration
    from arriero.export.pipeline.build import Build

    config = load_build(build_file)
    with ProgressBars(err) as watch:
        described = Build(config, str(build_file), watch).run_calibration()
    if as_json:
        _print_json(described)
    else:
        show_calibration(described, out)


@app.command()
def parity(
    bundle: BundleFolder,
    record: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a reference record, for a bundle that brings none, or in the place of its own."
        ),
    ] = None,
    recorded: Annotated[bool, typer.Option("--recorded", help="Show the build's own report; measure nothing.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint folder: compare with its PyTorch reference itself, over the whole vocabulary."
        ),
    ] = None,
    data: Set = None,
    samples: SampleCount = None,
    seed: Annotated[int | None, typer.Option(help="Which held-out prompts, with --against.", min=0)] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML here, one test case per row.")] = None,
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

    --against CHECKPOINT compares with the PyTorch reference itself, and refuses a record that says otherwise than the
    checkpoint; --set, --samples or --seed then choose other prompts than the record's. In CI:

        arriero parity bundles/portable-int8 --junit parity.xml
    """
    from arriero.runtimes.proof.pages import render_table, write_html, write_junit

    other = (data, samples, seed) != (None, None, None)
    if recorded and (record or against):
        raise ArrieroError("--recorded measures nothing", remedy="Leave out --record and --against, or --recorded")
    if other and against is None:
        what = "--set, --samples and --seed choose prompts that the reference record does not hold"
        raise ArrieroError(what, remedy="Add --against with the checkpoint folder")
    if output and (recorded or against):
        raise ArrieroError("--output takes a proof by the bundle's record", remedy="Leave out --recorded and --against")
    if other and record:
        raise ArrieroError("--record brings its own prompts", remedy="Leave out --set, --samples and --seed")
    chosen = _held_out(data, samples, seed) if other else None
    report = _recorded(bundle) if recorded else _measure(bundle, record, against, chosen, output)
    if junit:
        write_junit(report, junit)
    if html:
        write_html(report, html)
    if as_json:
        _print_json(report.to_dict())
    else:
        render_table(report, out)
    if report.failed:
        raise typer.Exit(1)


def _recorded(bundle: Path) -> ParityReport:
    from arriero.runtimes.integrity import check_proven, open_manifest
    from arriero.runtimes.proof.report import read_json

    check_proven(open_manifest(bundle))
    return read_json(bundle / "parity.json")


def _measure(
    bundle: Path, record: Path | None, checkpoint: Path | None, other: Cases | None, output: Path | None
) -> ParityReport:
    from arriero.export.cli.progress import ProgressBars

    with ProgressBars(err) as watch:
        if checkpoint is None:
            from arriero.export.proof.prove import prove_bundle

            return prove_bundle(bundle, record, watch, output)
        from arriero.export.proof.against import prove_against

        return prove_against(bundle, checkpoint, record, other, watch)


def _held_out(data: str | None, samples: int | None, seed: int | None) -> Cases:
    from arriero.export.build_file.schema import EMBEDDED, Cases

    seed = SEED if seed is None else seed
    if data is None:
        return Cases(set=EMBEDDED, samples=samples or 200, seed=seed)
    if not Path(data).exists():
        raise ArrieroError("there is no such data set", where=data, expected="a JSONL file, or a folder of images")
    return Cases(set=str(Path(data).absolute()), samples=samples, seed=seed)


@app.command()
def run(
    bundle: BundleFolder,
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image to ask about; give the option again for more images.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video to ask about, read as frames; shown after the images.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames to take of each video, evenly spaced.", min=1)] = 4,
    max_tokens: Annotated[int | None, typer.Option(help="End the answer after so many tokens.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher draws more freely.", min=0.0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens up to this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text.")] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Control tokens in the prompt are what they say, and <|image|> places a picture."
        ),
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Ask a bundle and stream its answer. Pictures come before the text.

    arriero run bundles/portable-int8 "What is 17 + 25?"

    arriero run bundles/portable-int8 "Describe the image." --image models/example.png

    arriero run bundles/portable-int8 "Which way does it move?" --video clip.mp4
    """
    from arriero.runtimes.api import load
    from arriero.runtimes.processor.video import read_video

    text = sys.stdin.read() if prompt == "-" else prompt
    pictures: list[ImageLike] = list(image or ())
    pictures += (frame for path in video or () for frame in read_video(path, frames))
    with load(bundle, threads) as session:
        stream = session.generate(
            session.encode(text, pictures, special_tokens=special_tokens),
            stream=True,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
        )
        for piece in stream:
            if not as_json:
                print(piece, end="", flush=True)
        result = stream.result
    if as_json:
        _print_json(result.__dict__)
        return
    print()
    rate = f", {(len(result.token_ids) - 1) / result.decode_s:.1f} tokens/s" if result.decode_s > 0 else ""
    summary = (
        f"{result.prompt_tokens} prompt tokens, TTFT {1000 * result.ttft_s:.0f} ms, {len(result.token_ids)} tokens"
    )
    err.print(f"[dim]{summary}{rate}, ended by {result.finish_reason}[/]", highlight=False)


@app.command()
def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Say what a bundle holds: model, target, hash chain, weights by scheme, expert coverage, parity.

    Every file is hashed and compared with the manifest on the way.
    """
    from arriero.export.cli.show_bundle import describe_bundle, show_bundle

    described = describe_bundle(bundle)
    if as_json:
        _print_json(described)
    else:
        show_bundle(described, out)


@app.command()
def doctor(
    backend: Annotated[str | None, typer.Option(help="Look at what this backend needs only.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has and lacks for each backend, and how to get it; exit code 3 if no build is possible."""
    from arriero.export.machine.doctor import diagnose

    diagnosis = diagnose(Path.cwd(), backend)
    if as_json:
        _print_json(diagnosis.to_json())
    else:
        diagnosis.render(out)
    raise typer.Exit(diagnosis.exit_code(backend))


@app.command()
def compare(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders, all made from one checkpoint.")],
    against: Annotated[Path, typer.Option(help="The checkpoint folder that they were made from.")],
    data: Set = None,
    samples: SampleCount = None,
    seed: Annotated[int, typer.Option(help="Which held-out prompts.", min=0)] = SEED,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a plot of quality against size.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure bundles side by side: size, tokens/s, KL, top tokens, routers, task accuracy with its standard error.

    arriero compare bundles/portable-fp32 bundles/portable-int4 --against models/chasqui --html compare.html
    """
    from arriero.export.cli.progress import ProgressBars
    from arriero.export.proof import compare as comparison

    cases = _held_out(data, samples, seed)
    with ProgressBars(err) as watch:
        lines = comparison.compare_bundles(bundles, against, cases, threads, watch)
    asked = {"set": Path(cases.set).name, "samples": lines[0].cases, "seed": seed}
    if html:
        labels = {"checkpoint": against, "held-out prompts": asked["set"], "how many": asked["samples"], "seed": seed}
        comparison.write_page(lines, {name: str(value) for name, value in labels.items()}, html)
    if as_json:
        _print_json(comparison.to_json(lines, {"against": str(against), **asked}))
    else:
        comparison.show(lines, out)


@profiles_app.command("list")
def profiles_list(as_json: Json = False) -> None:
    """List the shipped profiles."""
    from arriero.export.cli.show_profiles import list_profiles, show_rows

    rows = list_profiles()
    if as_json:
        _print_json(rows)
    else:
        show_rows(rows, out)


@profiles_app.command("show")
def profiles_show(profile: ProfileName, as_json: Json = False) -> None:
    """Show one profile: thresholds, calibration, and every selector with its scheme and reason."""
    from arriero.export.cli.show_profiles import describe_profile, open_profile, show_profile

    opened = open_profile(profile)
    if as_json:
        _print_json(describe_profile(opened))
    else:
        show_profile(opened, out)


@profiles_app.command("explain")
def profiles_explain(
    profile: ProfileName,
    tensor: Annotated[str, typer.Argument(help="A tensor's name in the checkpoint.")],
    as_json: Json = False,
) -> None:
    """Say how a profile stores one tensor, which selector decides it, and why."""
    from arriero.export.cli.show_profiles import explain, open_profile

    explanation = explain(open_profile(profile), tensor)
    if as_json:
        _print_json(explanation)
        return
    for key, value in explanation.items():
        shown = ", ".join(value) or "nothing" if isinstance(value, list) else value
        out.print(f"[dim]{key:>9}[/] {_escape(shown)}", highlight=False, soft_wrap=True)


@profiles_app.command("diff")
def profiles_diff(left: ProfileName, right: ProfileName, as_json: Json = False) -> None:
    """Show what differs between two profiles: thresholds, calibration, schemes, reasons."""
    from arriero.export.cli.show_profiles import diff, open_profile, show_rows

    rows = diff(open_profile(left), open_profile(right))
    if as_json:
        _print_json(rows)
    elif rows:
        show_rows(rows, out)
    else:
        out.print("no difference")


@app.command()
def schema() -> None:
    """Print the JSON schema of build files, for editors.

    arriero schema > build.schema.json
    """
    from arriero.export.build_file.schema import json_schema

    _print_json(json_schema())


def _version(asked: bool) -> None:
    if asked:
        print(f"arriero {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; one of our errors becomes one message and its exit code."""
    try:
        app()
    except ArrieroError as error:
        err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
