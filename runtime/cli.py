"""`osp`: a command that knows no commands. Each stage registers its own under the entry point `osp.commands`."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points, requires

import click

from quant.llama import CheckpointError
from runtime.model_store import ModelNotFoundError

DISTRIBUTION = "osp-runtime"
ENTRY_POINT_GROUP = "osp.commands"


class MissingExtraError(click.ClickException):
    """A command needs a package that was not installed."""

    def __init__(self, package: str) -> None:
        extras = extras_with(package)
        install = " or ".join(f"pip install '{DISTRIBUTION}[{extra}]'" for extra in extras)
        super().__init__(f"this command needs {package}, which is not installed; " + (install or "install it"))


class StageCommands(click.Group):
    """Loads a stage's module when its command is asked for.

    `osp --help` asks for all of them, to show their short helps: modules of commands import what is heavy, torch
    above all, when the command runs.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(entry_points(group=ENTRY_POINT_GROUP).names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        matching = entry_points(group=ENTRY_POINT_GROUP, name=cmd_name)
        return _load(next(iter(matching))) if matching else None

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command. What a user can cause, and mend, ends in a sentence and not in a traceback."""
        try:
            return super().invoke(ctx)
        except (CheckpointError, ModelNotFoundError) as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name is None or not extras_with(error.name):
                raise
            raise MissingExtraError(error.name.partition(".")[0]) from error


def extras_with(module: str) -> list[str]:
    """The extras that bring a module; none for what no extra brings. Package and module go by the same name."""
    package = re.escape(module.partition(".")[0])
    pattern = re.compile(rf"{package}\b(?!-).*; extra == ['\"](?P<extra>[\w-]+)['\"]", re.IGNORECASE)
    found = (pattern.match(requirement) for requirement in requires(DISTRIBUTION) or ())
    return sorted({match["extra"] for match in found if match} - {"dev"})


def _load(entry_point: EntryPoint) -> click.Command:
    try:
        command = entry_point.load()
    except ModuleNotFoundError as error:
        return _unavailable(entry_point.name, error)
    if not isinstance(command, click.Command):
        raise TypeError(f"the entry point {entry_point.name!r} of {ENTRY_POINT_GROUP!r} is no click command")
    return command


def _unavailable(name: str, error: ModuleNotFoundError) -> click.Command:
    """Stands in for a command whose module cannot be imported; says why in the help, and when it is run."""
    package = (error.name or str(error)).partition(".")[0]

    @click.command(name, short_help=f"(not available: needs {package})", add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def unavailable(**_: object) -> None:
        raise MissingExtraError(package) from error

    unavailable.ignore_unknown_options = True
    return unavailable


@click.group(cls=StageCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION, prog_name="osp")
def main() -> None:
    """Train, quantize, serve and measure 4-bit Outlier-Safe Pre-Training models."""


if __name__ == "__main__":
    main(prog_name="osp")
