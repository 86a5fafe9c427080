from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from runtime.server.settings import ServerSettings, read_settings, settings_options


@click.command()
@settings_options(positional="model")
def show(**options: object) -> None:
    click.echo(read_settings(options).model_dump_json())


def settings(*arguments: str, **environment: str) -> ServerSettings:
    result = CliRunner().invoke(show, arguments, env=environment)
    assert result.exit_code == 0, result.output
    return ServerSettings.model_validate_json(result.output)


def test_every_field_is_an_option_with_its_help_and_default() -> None:
    text = " ".join(CliRunner().invoke(show, ["--help"]).output.split())
    for name, field in ServerSettings.model_fields.items():
        if name != "model":
            assert f"--{name.replace('_', '-')} " in text
            assert field.description in text
            assert field.default is None or f"[default: {field.default}]" in text


def test_command_line_beats_environment_beats_default() -> None:
    assert settings().port == 8000
    assert settings(OSP_PORT="9000").port == 9000
    assert settings("--port", "9001", OSP_PORT="9000").port == 9001
    assert settings(OSP_PORT="").port == 8000
    assert settings("--port", "8000", OSP_PORT="9000").port == 8000


def test_the_model_is_an_argument() -> None:
    assert settings().model == "demo"
    assert settings(OSP_MODEL="other").model == "other"
    assert settings("third", OSP_MODEL="other").model == "third"


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--port", "70000"], {}, "--port"),
        ([], {"OSP_PORT": "many"}, "OSP_PORT"),
        (["--drain-timeout", "nan"], {}, "--drain-timeout"),
        (["--drain-timeout", "inf"], {}, "--drain-timeout"),
        (["--drain-timeout", "1e10"], {}, "--drain-timeout"),
        (["--drain-timeout", "86401"], {}, "--drain-timeout"),
        ([], {"OSP_DRAIN_TIMEOUT": "-1"}, "OSP_DRAIN_TIMEOUT"),
        (["--host", ""], {}, "--host"),
        (["--served-model-name", ""], {}, "--served-model-name"),
        ([], {"OSP_LOG_LEVEL": "loud"}, "OSP_LOG_LEVEL"),
    ],
)
def test_a_bad_value_is_named_where_it_came_from(arguments: list[str], environment: dict[str, str], named: str) -> None:
    result = CliRunner().invoke(show, arguments, env=environment)
    assert result.exit_code == 2
    assert f"Error: {named} should " in result.output
