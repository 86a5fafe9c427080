"""The settings as options of a click command, grouped by topic, and back from its command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from runtime.server.settings import ENV_PREFIX, ServerSettings, SettingsError

Command = TypeVar("Command", bound=Callable[..., Any])

POSITIONAL = "model"
"""The setting that is an argument, several times, and not an option."""

NAMESPACE = "vllm"
"""The setting whose options are another program's: whatever follows `--vllm.`."""


class SettingsCommand(click.Command):
    """A command whose help groups the options of `settings_options` by topic, and that takes those of `NAMESPACE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes the words that begin with `--vllm.` away first, whose names click does not know."""
        end = args.index("--") if "--" in args else len(args)
        prefix = f"--{NAMESPACE}."
        foreign = [word.removeprefix(prefix) for word in args[:end] if word.startswith(prefix)]
        rest = super().parse_args(ctx, [w for w in args[:end] if not w.startswith(prefix)] + args[end:])
        ctx.params[NAMESPACE] = dict(map(_foreign_argument, foreign)) or None
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a topic; options of the command's own come last."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for topic, of_topic in groupby(options, lambda option: getattr(option, "topic", "Other")):
            rows = [row for option in of_topic if (row := option.get_help_record(ctx))]
            field = ServerSettings.model_fields[NAMESPACE]
            if topic == topic_of(field):
                rows.append((f"--{NAMESPACE}.NAME=VALUE", str(field.description)))
            if rows:
                with formatter.section(topic):
                    formatter.write_dl(rows)


class _SettingOption(click.Option):
    def __init__(self, *arguments: Any, topic: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.topic = topic


def settings_options(command: Command) -> Command:
    """Decorates a click command with an option for each setting, and the argument `POSITIONAL`.

    What is not on the command line is None or (), so that `read_settings` can tell it from what is.
    """
    for name, field in reversed(ServerSettings.model_fields.items()):
        if name not in (POSITIONAL, NAMESPACE) and not _is_secret(field):
            command = _option(name, field)(command)
    return click.argument(POSITIONAL, nargs=-1)(command)


def _foreign_argument(word: str) -> tuple[str, str | bool]:
    """A name, with the underscores that it has in environment and file, and its value; a switch's is a bool."""
    name, equals, value = word.partition("=")
    head, dot, rest = name.partition(".")
    head = head.replace("-", "_")
    if equals:
        return head + dot + rest, value
    return (head.removeprefix("no_"), False) if head.startswith("no_") else (head, True)


def read_settings(command_line: Mapping[str, Any]) -> ServerSettings:
    """Joins command line, environment, file and defaults.

    Args:
        command_line: values by field name; None or () where an option was not given.

    Raises:
        click.UsageError: a value is of the wrong type or out of range; says which, and where it was given.
    """
    given = {name: value for name, value in command_line.items() if value not in (None, ())}
    try:
        return ServerSettings(**given)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except ValidationError as error:
        raise click.UsageError(_sentence(error.errors()[0], given)) from None


def _sentence(fault: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if not fault["loc"]:  # settings that do not agree
        return str(fault["msg"]).removeprefix("Value error, ")
    name = str(fault["loc"][0])
    variable = ENV_PREFIX + name.upper()
    if name in given:
        source = name.upper() if name == POSITIONAL else _flag(name)
    else:
        source = variable if os.environ.get(variable) else f"{name} in the settings file"
    wanted = fault["msg"].removeprefix("Input ").removeprefix("String ")
    shown = "" if _is_secret(ServerSettings.model_fields[name]) else f", is {fault['input']!r}"
    return f"{source} {wanted}{shown}"


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    several = get_origin(field.annotation) is tuple
    kind = _click_type(field.annotation)
    default = "" if field.default in (None, (), "") else f"  [default: {_written(field.default)}]"
    flag = f"{_flag(name)}/--no-{name.replace('_', '-')}" if kind is bool else _flag(name)
    return click.option(
        flag,
        name,
        cls=_SettingOption,
        topic=topic_of(field),
        type=kind,
        default=None,
        multiple=several,
        help=f"{field.description}{' May be repeated.' if several else ''}{default}",
    )


def topic_of(field: FieldInfo) -> str:
    """The heading under which help and documentation have a setting."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict):
        raise TypeError(f"a setting without a topic: {field.description}")
    return str(extra["topic"])


def _written(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in get_args(field.annotation)


def _click_type(annotation: Any) -> click.ParamType[Any] | type:
    """Only the rough type: ranges are checked by the model, in one place."""
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if get_args(annotation):  # "str | None": no value is how an option says None; "tuple[str, ...]" is repeated
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return click.Path() if annotation is Path else annotation
