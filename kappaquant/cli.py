"""The command line: each command imports what it needs when it runs, prints with rich, and ends with 2 on bad input."""

from __future__ import annotations

import logging
import sys

import typer

from kappaquant.commands.calibrating import calibrate, write
from kappaquant.commands.checkpoints import dequantize, inspect, verify
from kappaquant.commands.evaluation import evaluate
from kappaquant.commands.exporting import export
from kappaquant.commands.options import with_policy_options
from kappaquant.commands.plans import plan, quantize, scan
from kappaquant.commands.publishing import card, compare, push
from kappaquant.commands.serving import convert, serve
from kappaquant.commands.speed import bench
from kappaquant.commands.terminal import errors
from kappaquant.commands.text import chat, generate
from kappaquant.errors import KappaquantError

_COMMANDS = (
    scan, calibrate, plan, write, quantize, inspect, verify, dequantize, export, generate, chat, bench, evaluate, compare, card, push,
    convert, serve,
)  # fmt: skip
_PLANNING = (plan, quantize, export)  # take the options of every registered policy


def build() -> typer.Typer:
    """The commands, with the options of all policies that are registered by now."""
    built = typer.Typer(
        help="Mixed-precision codebook quantization of large language models, bits chosen by evidence.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in _COMMANDS:
        built.command()(with_policy_options(command) if command in _PLANNING else command)
    return built


app = build()


def main() -> None:
    """Entry point: one line and exit code 2 for what the input got wrong; a traceback only for our own mistakes."""
    from rich.logging import RichHandler

    logging.basicConfig(
        format="%(message)s", handlers=[RichHandler(console=errors(), show_time=False, show_path=False)]
    )
    try:
        app(standalone_mode=True)
    except KappaquantError as error:
        errors().print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        errors().print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
