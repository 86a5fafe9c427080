"""`osp`: a command that knows no commands. Each stage registers its own under the entry point `osp.commands`."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points, requires
from importlib.util import find_spec

import click

from quant.arithmetic import NonFiniteError
from quant.llama import CheckpointError
from quant.scheme import SchemeError
from quant.text import TextError
from runtime.engine.native_library import KernelError, NativeLibraryError
from runtime.engine.onnx_provider import OnnxProviderError
from runtime.engine.onnx_session import OnnxUnavailableError
from runtime.engine.registry import UnknownEngineError
from runtime.engine.vllm_arguments import VllmArgumentError, VllmUnavailableError
from runtime.evaluate import NothingToScoreError
from runtime.model_store import ModelNotFoundError
from runtime.text.tokenizer import TokenizerError

DISTRIBUTION = "osp-runtime"
ENTRY_POINT_GROUP = "osp.commands"

USER_ERRORS = (
    CheckpointError,
    KernelError,
    ModelNotFoundError,
    NativeLibraryError,
    NonFiniteError,
    NothingToScoreError,
    OnnxProviderError,
    OnnxUnavailableError,
    SchemeError,
    TextError,
    TokenizerError,
    UnknownEngineError,
    VllmArgumentError,
    VllmUnavailableError,
)
"""What a user can cause, and mend: told in one sentence. Anything else is a fault of ours and keeps its traceback.

A stage whose own errors live beside torch or a web server, which this module must not import, catches those itself.
"""


class MissingExtraError(click.ClickException):
    """A command needs a package that an extra brings and that is not installed."""

    def __init__(self, package: str, extras: list[str]) -> None:
        install = " or ".join(f"pip install '{DISTRIBUTION}[{extra}]'" for extra in extras)
        super().__init__(f"this command needs {package}, which is not installed; {install}")


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
        """Runs a command. `USER_ERRORS` and missing extras end in a sentence and not in a traceback."""
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            package = _top_level(error)
            extras = extras_with(package)
            # A module that an installed package lacks is a fault of ours.
            if not extras or find_spec(package) is not None:
                raise
            raise MissingExtraError(package, extras) from error


def extras_with(package: str) -> list[str]:
    """The extras that bring a package; none for what no extra brings. Package and module go by the same name."""
    pattern = re.compile(rf"{re.escape(package)}\b(?!-).*; extra == ['\"](?P<extra>[\w-]+)['\"]", re.IGNORECASE)
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
    """Stands in for a command whose module cannot be imported; says why in the help, and raises when it is run."""

    @click.command(name, short_help=f"(not available: needs {_top_level(error)})", add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def unavailable(**_: object) -> None:
        raise error

    unavailable.ignore_unknown_options = True
    return unavailable


def _top_level(error: ModuleNotFoundError) -> str:
    """The package of the module that was not found."""
    return (error.name or str(error)).partition(".")[0]


@click.group(cls=StageCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION, prog_name="osp")
def main() -> None:
    """Train, quantize, serve and measure 4-bit Outlier-Safe Pre-Training models."""


if __name__ == "__main__":
    main(prog_name="osp")
