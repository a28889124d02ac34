"""`arriero profiles`: what number formats there are, and why each tensor has its own."""

from __future__ import annotations

from typing import Annotated

import typer

from arriero.export.cli.options import Json, ProfileName, out, print_json
from arriero.export.cli.tables import print_wrapped

profiles_app = typer.Typer(
    name="profiles", help="Say what number formats there are, and why each tensor has its own.", no_args_is_help=True
)


@profiles_app.command("list")
def profiles_list(as_json: Json = False) -> None:
    """List the shipped profiles."""
    from arriero.export.cli.show_profiles import list_profiles, show_rows

    rows = list_profiles()
    if as_json:
        print_json(rows)
    else:
        show_rows(rows, out)


@profiles_app.command("show")
def profiles_show(profile: ProfileName, as_json: Json = False) -> None:
    """Show one profile: thresholds, calibration, and every selector with its scheme and reason."""
    from arriero.export.cli.show_profiles import describe_profile, open_profile, show_profile

    opened = open_profile(profile)
    if as_json:
        print_json(describe_profile(opened))
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
        print_json(explanation)
        return
    for key, value in explanation.items():
        shown = ", ".join(value) or "nothing" if isinstance(value, list) else value
        print_wrapped(out, shown, 10, f"{key:>9}")


@profiles_app.command("diff")
def profiles_diff(left: ProfileName, right: ProfileName, as_json: Json = False) -> None:
    """Show what differs between two profiles: thresholds, calibration, schemes, reasons."""
    from arriero.export.cli.show_profiles import diff, open_profile, show_rows

    rows = diff(open_profile(left), open_profile(right))
    if as_json:
        print_json(rows)
    elif rows:
        show_rows(rows, out)
    else:
        out.print("no difference")
