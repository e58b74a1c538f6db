"""``axolotl scao ...``, for Axolotl's entry point group ``axolotl.cli_commands``.

Axolotl takes commands of click. Those of typer are some only up to typer 0.25, later releases have a click of their own:
so the arguments are handed on as they are.
"""

from __future__ import annotations

import click

from scao_hf.tools.cli import app


@click.command(
    "scao",
    help="Plan, watch and check fine-tuning with SCAO.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Run ``scao-hf`` with the arguments; it ends the process with its own exit code."""
    app(list(arguments), prog_name="axolotl scao")
