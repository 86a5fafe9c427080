"""Where settings come from, which of them wins, and what is said of those that cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from runtime.server.settings import ServerSettings
from runtime.server.settings_options import SettingsCommand, read_settings, settings_options, topic_of

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
NO_OPTION = {"model", "api_key", "vllm"}
"""An argument, a secret, and a namespace of options."""


@click.command(cls=SettingsCommand)
@settings_options
def show(**options: object) -> None:
    click.echo(read_settings(options).model_dump_json())


def settings(*arguments: str, **environment: str) -> ServerSettings:
    result = CliRunner().invoke(show, arguments, env=environment)
    assert result.exit_code == 0, result.output
    return ServerSettings.model_validate_json(result.output)


def refusal(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(show, arguments, env=environment)
    assert result.exit_code == 2, result.output
    return result.output.rpartition("Error: ")[2].strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "osp.yaml"


def test_every_field_is_an_option_with_its_help_and_default() -> None:
    text = " ".join(CliRunner().invoke(show, ["--help"]).output.split())
    for name, field in ServerSettings.model_fields.items():
        if name in NO_OPTION:
            assert f"--{name.replace('_', '-')} " not in text
        else:
            assert f"--{name.replace('_', '-')} " in text
            assert field.description in text


def test_the_help_is_grouped_by_topic() -> None:
    lines = CliRunner().invoke(show, ["--help"]).output.splitlines()
    headings = [line.removesuffix(":") for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    topics = dict.fromkeys(topic_of(field) for field in ServerSettings.model_fields.values())
    assert headings == [*topics, "Other"]
    access = lines[lines.index("Access:") : lines.index("Limits:")]
    assert any("--tokens-per-minute" in line for line in access)


def test_command_line_beats_environment_beats_file_beats_default(file: Path) -> None:
    file.write_text("port: 9100\nmax_waiting: 7\nlog_prompts:\n")
    config = ("--config", str(file))
    assert settings().port == 8000
    assert settings(*config).port == 9100
    assert settings(OSP_CONFIG=str(file)).port == 9100
    assert settings(*config, OSP_PORT="9000").port == 9000
    assert settings(*config, "--port", "9001", OSP_PORT="9000").port == 9001
    assert settings(*config, OSP_PORT="").port == 9100
    assert settings(*config, "--port", "8000", OSP_PORT="9000").port == 8000
    assert settings(*config).max_waiting == 7
    assert settings(*config).log_prompts is False


def test_arguments_of_vllm_come_by_their_own_names(file: Path) -> None:
    words = ("--vllm.max-num-seqs=8", "--vllm.enforce-eager", "demo", "--vllm.no-enable-prefix-caching")
    given = settings(*words, "--vllm.compilation-config.mode=0", "--port", "9000")
    assert given.vllm == {
        "max_num_seqs": "8",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "compilation_config.mode": "0",
    }
    assert (given.model, given.port) == (("demo",), 9000)
    file.write_text("vllm:\n  max_num_seqs: 4\n  dtype: bfloat16\n")
    config = ("--config", str(file))
    assert settings(*config, "--vllm.dtype=float32").vllm == {"max_num_seqs": 4, "dtype": "float32"}
    assert settings(*config, OSP_VLLM='{"max_num_seqs": 2}').vllm == {"max_num_seqs": 2, "dtype": "bfloat16"}
    assert settings("--", "--vllm.x").vllm == {}
    assert "--vllm.NAME=VALUE" in CliRunner().invoke(show, ["--help"]).output


def test_switches_have_two_ends() -> None:
    assert settings("--log-prompts").log_prompts is True
    assert settings("--no-log-prompts", OSP_LOG_PROMPTS="true").log_prompts is False


def test_models_are_arguments() -> None:
    assert settings().model == ("demo",)
    assert settings(OSP_MODEL="other").model == ("other",)
    assert settings("third", OSP_MODEL="other").model == ("third",)
    assert settings("a=x y", "b").model == ("a=x y", "b")
    assert settings(OSP_MODEL="a=x y, b").model == ("a=x y", "b")


def test_several_values_in_every_place(file: Path) -> None:
    origins = ("https://a.example", "https://b.example")
    file.write_text("cors_origin:\n- https://a.example\n- https://b.example\nmodel: demo\n")
    assert settings("--config", str(file)).cors_origin == origins
    assert settings("--config", str(file)).model == ("demo",)
    assert settings("--cors-origin", origins[0], "--cors-origin", origins[1]).cors_origin == origins
    assert settings(OSP_CORS_ORIGIN=",".join(origins)).cors_origin == origins


def test_keys_come_from_the_environment_or_the_file_and_are_not_shown(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSP_API_KEY", "alice:sesame, open")
    assert [key.get_secret_value() for key in ServerSettings().api_key] == ["alice:sesame", "open"]
    assert "sesame" not in repr(ServerSettings())
    monkeypatch.delenv("OSP_API_KEY")
    file.write_text("api_key: [alice:sesame]")
    assert [key.get_secret_value() for key in ServerSettings(config=file).api_key] == ["alice:sesame"]
    file.write_text("api_key: {alice: sesame}")
    message = refusal("--config", str(file))
    assert "api_key in the settings file" in message
    assert "sesame" not in message


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--port", "70000"], {}, "--port"),
        ([], {"OSP_PORT": "many"}, "OSP_PORT"),
        (["--drain-timeout", "nan"], {}, "--drain-timeout"),
        (["--drain-timeout", "inf"], {}, "--drain-timeout"),
        (["--drain-timeout", "1e10"], {}, "--drain-timeout"),
        (["--drain-timeout", "86401"], {}, "--drain-timeout"),
        (["--stall-timeout", "0"], {}, "--stall-timeout"),
        ([], {"OSP_DRAIN_TIMEOUT": "-1"}, "OSP_DRAIN_TIMEOUT"),
        (["--host", ""], {}, "--host"),
        (["--served-model-name", ""], {}, "--served-model-name"),
        ([], {"OSP_LOG_LEVEL": "loud"}, "OSP_LOG_LEVEL"),
        ([], {"OSP_MAX_BODY_BYTES": "4MB"}, "OSP_MAX_BODY_BYTES"),
        ([], {"OSP_LOG_PROMPTS": "perhaps"}, "OSP_LOG_PROMPTS"),
    ],
)
def test_a_bad_value_is_named_where_it_came_from(arguments: list[str], environment: dict[str, str], named: str) -> None:
    assert refusal(*arguments, **environment).startswith(f"{named} should ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port: many", "port in the settings file should be a valid integer"),
        ("port: 1\nprot: 2", "has 'prot', which is no setting"),
        ("config: other.yaml", "has 'config', which is no setting"),
        ("- port", "must hold lines of the form `name: value`"),
        ("port: [1", "is no YAML"),
        (b"\xff", "is no YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_named(file: Path, content: str | bytes | None, message: str) -> None:
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal("--config", str(file))


def test_an_empty_file_is_fine(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert settings("--config", str(file)).port == 8000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tls-cert", "cert.pem"], "tls_cert and tls_key belong together"),
        (["a", "b", "--served-model-name", "c"], "name each as NAME=MODEL"),
    ],
)
def test_settings_that_do_not_agree(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


def test_the_page_lists_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text("utf-8"), re.MULTILINE))
    fields = ServerSettings.model_fields
    assert list(rows) == list(fields)
    for name, shown in rows.items():
        default = fields[name].default
        if default in (None, (), "", {}):
            assert shown == "", name
        else:
            written = ", ".join(default) if isinstance(default, tuple) else str(default).lower()
            assert shown == f"`{written}`", name
