"""`graphcomp doctor`."""

import typer

from graphcomp.cli.console import out_console


def doctor_command() -> None:
    """Check versions, instruction set, providers that really work, conflicts; say what to do."""
    from graphcomp.runtime import diagnose, render

    findings = diagnose()
    out_console.print(render(findings))
    if any(finding.essential and not finding.ok for finding in findings):
        raise typer.Exit(1)
