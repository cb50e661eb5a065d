"""``fedkrso``: plan a run, compare methods, draw runs, export a model of any round, read and verify a ledger."""

import typer

from fedkrso_app.cli.comparing import compare
from fedkrso_app.cli.planning import plan
from fedkrso_app.cli.runs import export, ledger, privacy, report

# The commands import the rest of the package when they run, since torch takes seconds and --help should not.

app = typer.Typer(
    name="fedkrso",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=__doc__,
)
for command in (compare, plan, report, export, ledger, privacy):
    app.command()(command)
