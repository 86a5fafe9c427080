"""All settings of the server, in one place: their names, types, defaults and help.

The options of `osp serve` are made from the fields, so the command line, the environment (`OSP_` and the name) and the
defaults cannot disagree. The command line beats the environment, which beats the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.engine.registry import ENGINES
from runtime.model_store import BUNDLED_MODELS, DEFAULT_MODEL

ENV_PREFIX = "OSP_"
Command = TypeVar("Command", bound=Callable[..., Any])


class ServerSettings(BaseSettings):
    """What `osp serve` can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", allow_inf_nan=False)

    model: str = Field(
        DEFAULT_MODEL,
        description=f"A directory, a Hugging Face name, or a bundled model ({', '.join(BUNDLED_MODELS)}).",
    )
    engine: str = Field("auto", description=f"What runs the model: {', '.join(ENGINES)}.")
    threads: int = Field(
        0, ge=0, le=1024, description="Threads of the native engine; 0 for as many as the process may use."
    )
    kernel: str = Field("", description="The native engine's kernel, of those that osp bench kernel lists.")
    # An empty host would mean every address.
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 opens the server to the network."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    served_model_name: str | None = Field(
        None, min_length=1, description="What clients call the model; by default its name or that of its directory."
    )
    max_waiting: int = Field(256, ge=1, description="Sequences that may wait to be run; beyond them the answer is 503.")
    max_prompts: int = Field(128, ge=1, description="Prompts in one request.")
    drain_timeout: float = Field(
        30.0, ge=0, le=86_400, description="Seconds that running requests get to finish after SIGTERM or SIGINT."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity to log.")

    @property
    def prompt_limit(self) -> int:
        """Prompts in one request: a request of more than may wait could never be admitted."""
        return min(self.max_prompts, self.max_waiting)


def settings_options(*, positional: str) -> Callable[[Command], Command]:
    """Decorates a click command with one option for each field; `positional` becomes an optional argument instead.

    What is not on the command line is None, so that `read_settings` can tell it from what is.
    """

    def decorate(command: Command) -> Command:
        for name, field in reversed(ServerSettings.model_fields.items()):
            if name != positional:
                command = _option(name, field)(command)
        return click.argument(positional, required=False)(command)

    return decorate


def read_settings(command_line: Mapping[str, Any]) -> ServerSettings:
    """Joins command line, environment and defaults.

    Args:
        command_line: values by field name; None where an option was not given.

    Raises:
        click.UsageError: a value is of the wrong type or out of range; names the option and the variable.
    """
    given = {name: value for name, value in command_line.items() if value is not None}
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        source = _flag(name) if name in given else ENV_PREFIX + name.upper()
        expected = fault["msg"].removeprefix("Input ").removeprefix("String ")
        raise click.UsageError(f"{source} {expected}, is {fault['input']!r}") from None


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    shown_default = "" if field.default is None else f"  [default: {field.default}]"
    return click.option(
        _flag(name),
        name,
        type=_click_type(field.annotation),
        help=f"{field.description}{shown_default}",
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _click_type(annotation: Any) -> click.ParamType[Any] | type:
    """Only the rough type: ranges are checked by the model, in one place."""
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if get_args(annotation):  # "str | None": no value is how an option says None
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation  # type: ignore[no-any-return]
