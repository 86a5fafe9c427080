"""All settings of the server, in one place: their names, types, defaults and help.

The command line, the environment (`OSP_` and the name) and the YAML file of `--config` have the same names, and beat
one another in that order. The options of `osp serve` are made from the fields (`settings_options`), so that they
cannot disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from runtime.engine.registry import ENGINES
from runtime.model_store import BUNDLED_MODELS, DEFAULT_MODEL

ENV_PREFIX = "OSP_"


class SettingsError(ValueError):
    """Settings that cannot be; the message says which, where they were given and what is wanted."""


def _items(value: object) -> object:
    """Several values are separated by commas where they are given as one text."""
    return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value


Several = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_items)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_items)]
"""Several that no message shows, and that have no option: other users of a machine can read its command lines."""


def _setting(topic: str, default: Any, description: str, **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"topic": topic}, **bounds)


class ServerSettings(BaseSettings):
    """What `osp serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", allow_inf_nan=False, frozen=True
    )

    config: Path | None = _setting("General", None, "A YAML file with settings by these names, one a line.")

    model: Several = _setting(
        "Models",
        (DEFAULT_MODEL,),
        f"MODEL or NAME=MODEL, one or several. A MODEL is a directory, a Hugging Face name or a bundled model "
        f"({', '.join(BUNDLED_MODELS)}), and NAME what clients call it. The first answers requests that name none.",
        min_length=1,
    )
    served_model_name: str | None = _setting(
        "Models", None, "What clients call the only model; by default its name or that of its directory.", min_length=1
    )
    chat_template: Path | None = _setting(
        "Models", None, "A file with the Jinja template of chats, for all models; by default the checkpoint's own."
    )
    engine: str = _setting("Models", "auto", f"What runs the models: {', '.join(ENGINES)}.")
    threads: int = _setting(
        "Models", 0, "Threads of a native engine; 0 for as many as the process may use.", ge=0, le=1024
    )
    kernel: str = _setting("Models", "", "The native engine's kernel, of those that osp bench kernel lists.")

    onnx_provider: Literal["cpu", "cuda", "tensorrt"] = _setting(
        "Models", "cpu", "What ONNX Runtime runs the graph on: cpu, cuda or tensorrt; of the engine onnx only."
    )
    vllm: dict[str, Any] = _setting(
        "Models",
        {},
        "vLLM's own engine arguments, by their names: --vllm.NAME=VALUE, or --vllm.NAME for a switch; in the "
        "environment and the file an object.",
    )

    # An empty host would mean every address.
    host: str = _setting(
        "Network", "127.0.0.1", "Address to listen on; 0.0.0.0 opens the server to the network.", min_length=1
    )
    port: int = _setting("Network", 8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    cors_origin: Several = _setting(
        "Network", (), "An origin (https://example.org) whose pages may call the server from browsers; * is every one."
    )
    tls_cert: Path | None = _setting(
        "Network", None, "PEM file with the certificate and its chain; read anew when it changes, and on SIGHUP."
    )
    tls_key: Path | None = _setting("Network", None, "PEM file with the certificate's private key.")
    stream_interval: float = _setting(
        "Network",
        0.02,
        "Least seconds between two events of a stream: tokens that come sooner share one. The first and the last do "
        "not wait; 0 sends an event a token.",
        ge=0,
        le=10,
    )

    api_key: Secrets = _setting(
        "Access", (), "API keys, each KEY or NAME:KEY, separated by commas. Not an option: command lines are public."
    )
    api_key_file: Path | None = _setting(
        "Access", None, "A file with API keys, one a line, KEY or NAME:KEY; read anew when it changes, and on SIGHUP."
    )
    playground: Literal["keyed", "open", "off"] = _setting(
        "Access",
        "keyed",
        "Who gets the page at /: keyed, whoever has a key where there are keys; open, everybody; off, nobody.",
    )
    requests_per_minute: int = _setting(
        "Access", 0, "POST requests a minute of one key, or without keys of one address; 0 for no limit.", ge=0
    )
    tokens_per_minute: int = _setting(
        "Access", 0, "Tokens a minute, prompt and answer, of one key or address; 0 for no limit.", ge=0
    )

    # Below the 1,024 files that a process may usually have open.
    max_connections: int = _setting(
        "Limits",
        1000,
        "Connections at a time; others are answered with 503, but for 16 that ask for health or metrics.",
        ge=1,
    )
    max_waiting: int = _setting(
        "Limits", 256, "Sequences that may wait to be run; beyond them the answer is 503.", ge=1
    )
    max_prompts: int = _setting("Limits", 128, "Prompts in one request.", ge=1)
    max_body_bytes: int = _setting("Limits", 4 * 2**20, "Size of a request's body.", ge=1024, le=2**30)
    max_header_bytes: int = _setting("Limits", 32_768, "Size of a request's line and headers.", ge=1024, le=2**20)
    read_timeout: float = _setting(
        "Limits", 30.0, "Seconds that a client gets to send a whole request.", gt=0, le=86_400
    )
    write_timeout: float = _setting(
        "Limits", 30.0, "Seconds that a client may leave a full buffer unread before it is cut off.", gt=0, le=86_400
    )

    stall_timeout: float = _setting(
        "Life cycle",
        60.0,
        "Seconds without a finished step, while work waits, after which an engine counts as hung.",
        gt=0,
        le=86_400,
    )
    drain_timeout: float = _setting(
        "Life cycle", 30.0, "Seconds that running requests get to finish after SIGTERM or SIGINT.", ge=0, le=86_400
    )

    log_level: Literal["debug", "info", "warning", "error"] = _setting("Logs", "info", "Least severity to log.")
    log_format: Literal["text", "json"] = _setting("Logs", "text", "Lines of text, or one JSON object a line.")
    log_prompts: bool = _setting("Logs", False, "Log the bodies of requests, and with them what users write.")
    otlp_endpoint: str | None = _setting(
        "Logs", None, "Send OpenTelemetry spans to this URL (http://host:4318/v1/traces); needs the extra otel."
    )

    @property
    def prompt_limit(self) -> int:
        """Prompts in one request: a request of more than may wait could never be admitted."""
        return min(self.max_prompts, self.max_waiting)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or none")
        if self.served_model_name is not None and len(self.model) > 1:
            raise ValueError("served_model_name names the only model; of several, name each as NAME=MODEL")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line (or what a program gives), the environment, the file."""
        path = init_settings().get("config") or env_settings().get("config")
        from_file = InitSettingsSource(settings_cls, _read_file(Path(path)) if path else {})
        return init_settings, env_settings, from_file


def _read_file(path: Path) -> dict[str, Any]:
    """What a settings file says; keys without a value count as absent."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"the settings file {path} must hold lines of the form `name: value`")
    known = set(ServerSettings.model_fields) - {"config"}
    for name in content:
        if name not in known:
            raise SettingsError(
                f"the settings file {path} has {str(name)!r}, which is no setting; osp serve --help lists them"
            )
    return {name: value for name, value in content.items() if value is not None}
