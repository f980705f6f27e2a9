"""sparse-export doctor"""

from __future__ import annotations

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine has: devices, runtimes, libraries, and what to install.

    Ends with 0 whatever it finds: a thing that is not here is a finding.
    """
    from dataclasses import asdict

    from sparse_export.doctor import examine

    examination = examine()
    print_result(asdict(examination), examination.shown(), as_json)
