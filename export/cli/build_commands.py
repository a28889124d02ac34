"""`arriero plan`, `build`, `calibrate` and `schema`: what is done with a build file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.errors import ArrieroError
from arriero.export.cli.options import STDOUT, BuildFile, Json, err, out, print_json

if TYPE_CHECKING:
    from arriero.export.build_file.schema import BuildConfig
    from arriero.export.machine.jobs import Submit

Workers = Annotated[
    str | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="The scheduler of a Dask cluster whose workers round experts and lower targets: same bytes, less time.",
    ),
]


def plan(
    build_file: BuildFile = Path("build.yaml"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Plan for this checkpoint in the place of the build file's. Its headers are enough; "
            "synthetic://maverick needs no files."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Also foretell what bundles would do under a cap on memory, such as 16GiB: experts that fit, how "
            "often they are found there, tokens per second. Measures this machine's memory and the drive of `output`."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="With --memory: where experts are needed, as `arriero trace` wrote it; evenly if left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a build would do and cost, without touching anything.

    Shows the stages (done or to do), the bytes of each bundle by number format, peak memory and disk against the
    budgets, and what context costs: KV cache bytes at 8k, 128k, 1M and 10M tokens for each cache format.
    """
    from arriero.export.build_file.locate import resolve_model
    from arriero.export.build_file.read import load_build
    from arriero.export.cli.progress import Progress
    from arriero.export.cli.show_capped import capped_json, show_capped
    from arriero.export.cli.show_plan import show_plan
    from arriero.export.pipeline.foretell_cap import foretell_capped
    from arriero.export.pipeline.plan import make_plan
    from arriero.sizes import parse_bytes

    config = load_build(build_file)
    if model is not None:
        config = config.model_copy(update={"model": resolve_model(model, Path.cwd())})
    if trace is not None and memory is None:
        raise ArrieroError("--trace says nothing without a cap", remedy="Add --memory, such as --memory 16GiB")
    with Progress(err) as watch:
        watch("plan", 0, 0, "")
        planned = make_plan(config)
        capped = None if memory is None else foretell_capped(config, parse_bytes(memory), trace)
    if as_json:
        print_json(planned.to_json() | ({} if capped is None else capped_json(*capped)))
    else:
        show_plan(planned, out)
        if capped is not None:
            show_capped(*capped, out)
    planned.check(str(build_file))


def build(
    build_file: BuildFile = Path("build.yaml"),
    dump_graphs: Annotated[
        Path | None,
        typer.Option(help="Keep each graph that is lowered here after every phase, to find the one that goes wrong."),
    ] = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="End with exit code 3 where a bundle is for another device.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML here, whatever happens: one suite per bundle.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="[FILE]", help="Write the results as JSON here, whatever happens; printed without FILE."
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Build every bundle that the build file names, and publish those that pass parity.

    Steps that are done are not done again: kill a build at any point and give the same command to go on; an unchanged
    build does nothing. A bundle appears under its name only once its parity against the PyTorch reference has passed;
    otherwise the report stays beside it as an HTML page. A target that fails does not stop the others: a table at the
    end says what became of each and why, and the exit code is the highest of theirs. A bundle for a device that this
    machine is not is published unproven, and `arriero parity` on the device completes it.

    Graphs and compiled kernels, which know nothing of weights, are kept for other output folders too: in ARRIERO_CACHE,
    by default ~/.cache/arriero; set the variable to nothing to keep none.
    """
    from arriero.export.build_file.read import load_build
    from arriero.export.cli.progress import Progress
    from arriero.export.cli.show_results import Outcome, show_outcome
    from arriero.export.pipeline.build import Build
    from arriero.runtimes.proof.report import check_writable

    printed = json_file is not None and str(json_file) == STDOUT
    if json_file is not None and json_file.suffix in (".yaml", ".yml"):
        remedy = "Give another FILE, or `--json` at the end to print it"
        raise ArrieroError("a build file is no place for results", where=f"--json {json_file}", remedy=remedy)
    for report in (junit, None if printed else json_file):
        if report is not None:
            check_writable(report)
    if dump_graphs is not None:
        _check_folder(dump_graphs)
    outcome = Outcome(str(build_file), require_proof)
    try:
        outcome.config = load_build(build_file)
        with submitting(workers, outcome.config) as submit, Progress(err) as progress:
            at_work = Build(outcome.config, str(build_file), progress, dump_graphs, progress.tell, submit)
            outcome.results = at_work.results  # filled as it goes
            at_work.run()
    except BaseException as error:
        outcome.error = error
        if isinstance(error, KeyboardInterrupt) and outcome.config is not None:
            show_outcome(outcome, None if printed else out, err)
        raise
    finally:
        outcome.write(junit, None if printed else json_file)
    if printed:
        print_json(outcome.to_json())
    show_outcome(outcome, None if printed else out, err)
    raise typer.Exit(outcome.exit_code)


def _check_folder(path: Path) -> None:
    """Refuse a folder for graphs that cannot be made or written to, before anything is traced."""
    from arriero.runtimes.proof.report import write_nothing

    try:
        write_nothing(path)
    except OSError as error:
        what, remedy = f"the folder cannot be written to ({error.strerror})", "Give another folder"
        raise ArrieroError(what, where=f"--dump-graphs {path}", remedy=remedy) from None


def calibrate(build_file: BuildFile = Path("build.yaml"), workers: Workers = None, as_json: Json = False) -> None:
    """Run the build file's calibration alone, and show what it saw: tokens per expert and activation ranges.

    What it finds lies where `arriero build` looks for it, so that a build goes on from here; killed, the same command
    goes on after the last finished layer. Experts that too few tokens reach are named: give the set more samples, or
    other ones. Samples come from `calibration.set`: `embedded`, a JSONL file, or a folder of images.
    """
    from arriero.export.build_file.read import load_build
    from arriero.export.cli.progress import Progress
    from arriero.export.cli.show_calibration import show_calibration
    from arriero.export.pipeline.build import Build

    config = load_build(build_file)
    with submitting(workers, config) as submit, Progress(err) as watch:
        described = Build(config, str(build_file), watch, tell=watch.tell, submit=submit).run_calibration()
    if as_json:
        print_json(described)
    else:
        show_calibration(described, out)


@contextmanager
def submitting(workers: str | None, config: BuildConfig) -> Iterator[Submit]:
    """Who does the jobs of a build: this process, or the cluster whose scheduler is at `workers`."""
    from arriero.export.machine.jobs import do_here

    if workers is None:
        yield do_here
        return
    from arriero.export.cluster.dask_cluster import DaskCluster, check_address

    with DaskCluster(check_address(workers), config.output, config.budgets.host_memory) as cluster:
        err.print(f"{cluster.workers} workers at {workers}", markup=False, highlight=False)
        yield cluster.submit


def schema() -> None:
    """Print the JSON schema of build files, for editors.

    arriero schema > build.schema.json
    """
    from arriero.export.build_file.schema import json_schema

    print_json(json_schema())
