"""``llamaserve doctor``: what keeps this machine from serving models well, and the commands that fix it."""

from __future__ import annotations

from typing import Annotated

import typer

from llamaserve.cli_models import Json, ModelsDir, ModelsFile
from llamaserve.cli_output import out, read_settings, say_json


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)


def doctor(
    models: Annotated[
        list[str] | None, typer.Argument(help="Names, aliases or files; none: all that are here.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address that the server is to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port that the server is to listen on.")] = None,
    memory: Annotated[str | None, typer.Option(help="Main memory that models may take: 6GB, 75%.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="GPU memory that models may take.")] = None,
    as_json: Json = False,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
) -> None:
    """Examine this machine and its models; each finding ends with the command that fixes it. Exit status 1 if there is
    a problem.
    """
    from llamaserve.doctor.case import Case
    from llamaserve.doctor.examination import examine
    from llamaserve.doctor.report import as_report, print_report

    settings = read_settings(
        host=host, port=port, memory=memory, gpu_memory=gpu_memory, models_file=models_file, models_dir=models_dir
    )
    findings = examine(Case(settings, tuple(models or ())))
    if as_json:
        report = as_report(findings)
        say_json(report)
        problems = report.problems
    else:
        problems = print_report(findings, out)
    if problems:
        raise typer.Exit(1)
