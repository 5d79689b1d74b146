"""What all commands share: one-line errors, logging to stderr, numbers for people."""

import errno
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from shared.errors import ProjectError, printable
from shared.readable import NO_URLS, is_url


class _LocalPath(click.Path):
    """A path; a URL would be one too, of a folder `http:`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(str(value)):
            self.fail(f"{value!r} {NO_URLS}", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = _LocalPath(path_type=Path, file_okay=False)
FILE = _LocalPath(path_type=Path, dir_okay=False)
# Options that several commands have.
VISION_TOWER = click.option(
    "--vision-tower", help="CLIP folder or hub id.  [default: the model's config says]"
)
DATA = click.option(
    "--data", required=True, multiple=True,
    help="Tars: a path, a brace range ('t-{000..099}.tar') or a glob, in quotes. Repeatable.",
)  # fmt: skip
_TARS = ("--data", "--eval-data")
"Options that take one pattern of tars."
DEVICE = click.option("--device", help="cpu, cuda, cuda:1, ....  [default: cuda if there is one]")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def only_with(option: str, is_given: bool, **others: object) -> None:
    """Refuse options that count only beside another one, if that one is not given.

    Raises:
        click.UsageError: names both.
    """
    for name, value in others.items():
        if value and not is_given:
            raise click.UsageError(f"--{name.replace('_', '-')} needs {option}")


class OneLineErrors:
    """Mixin for click commands: our own errors, Ctrl-C and a full disk in one line; any other error
    keeps its traceback.
    """

    interrupted = "what was committed stays, nothing half counts"
    "Said after Ctrl-C."

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt:
            click.echo(f"Interrupted: {self.interrupted}", err=True)
            ctx.exit(130)  # as shells count a process that SIGINT ended
        except ProjectError as error:
            raise click.ClickException(printable(str(error))) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            where = error.filename or "the output"
            raise click.ClickException(f"{where} cannot be written ({error.strerror})") from error


class Command(OneLineErrors, click.Command):
    """One command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = [*args]  # parsing takes them away
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            expanded = _expanded_by_the_shell(given)
            if expanded is None:
                raise
            option, tars = expanded
            message = (
                f"{len(tars):,} tars stand behind {option}, which takes one pattern: the shell has "
                f"expanded it. Put it in quotes, as in {option} {shlex.quote(_pattern(tars))}"
            )
            raise click.UsageError(message, ctx) from error


class Group(OneLineErrors, click.Group):
    """A command with subcommands."""


def _expanded_by_the_shell(args: Sequence[str]) -> tuple[str, list[str]] | None:
    """An option with more than one tar behind it, and these."""
    for place, option in enumerate(args):
        if option in _TARS:
            tars = [*takewhile(lambda text: text.endswith(".tar"), args[place + 1 :])]
            if len(tars) > 1:
                return option, tars
    return None


def _pattern(tars: Sequence[str]) -> str:
    """A pattern that finds them, if they are numbered tars of one folder."""
    if len({os.path.dirname(tar) for tar in tars}) > 1:
        return "tars/*.tar"
    # Of characters, as is wanted here: commonpath would give the folder.
    start = os.path.commonprefix([tar.removesuffix(".tar") for tar in tars])  # noqa: RUF071
    return f"{start.rstrip('0123456789')}*.tar"


def configure_logging(verbose: bool) -> None:
    """Log lines to stderr; stdout is for results."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # a line per file of a checkpoint


def printable_lines(lines: Iterable[str]) -> str:
    """Lines for a terminal; what they quote of a stranger's cache cannot steer it."""
    return "\n".join(printable(line) for line in lines)


def bytes_text(size: int | float) -> str:
    """`1.2 MB`: decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
