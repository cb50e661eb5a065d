"""Where the commands print, and what they say of errors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from fedkrso_app.config import ConfigError
from fedkrso_app.records.ledger import LedgerError

# A pipe or a file has no width; the tables should not be cut to 80 columns there.
out = Console(width=None if sys.stdout.isatty() else 120)
err = Console(width=None if sys.stderr.isatty() else 120, stderr=True)
PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}  # for sentences and paths


@contextmanager
def explained() -> Iterator[None]:
    """What the user can fix ends with exit code 2 and one sentence."""
    try:
        yield
    except (ConfigError, LedgerError, OSError) as error:  # the last: a full disk, a folder that cannot be written to
        err.print(f"Error: {error}", **PLAIN)
        raise typer.Exit(2) from None
