"""`osp serve`."""

from __future__ import annotations

from typing import Any

import click

from runtime.server.settings_options import SettingsCommand, read_settings, settings_options


@click.command(cls=SettingsCommand, short_help="Serve models over an OpenAI-compatible HTTP API.")
@settings_options
def serve(**options: Any) -> None:
    """Serve MODELs over an OpenAI-compatible HTTP API.

    A MODEL is a directory, a Hugging Face name (owner/name, which is downloaded) or the name of a bundled model; left
    out, it is the bundled demo model. NAME=MODEL says what clients call it: osp serve small=DIR1 large=DIR2.

    Every option can also be set in the environment, as OSP_ and its name (OSP_PORT=9000), or by its name in the
    YAML file of --config (port: 9000). The command line beats the environment, which beats the file.

    With --engine vllm, vLLM's own engine arguments follow --vllm., and their values an equals sign:
    --vllm.max-num-seqs=64 --vllm.enforce-eager.
    """
    settings = read_settings(options)
    # Not at the top: `osp --help` shows this command too, and need not load a web server for it.
    from runtime.engine.base import EngineDeadError
    from runtime.server.lifecycle import StartError, leave_threads_behind, run_server
    from runtime.server.logging_setup import configure_logging

    configure_logging(settings)
    try:
        run_server(settings)
    except (StartError, EngineDeadError) as error:
        raise click.ClickException(str(error)) from error
    leave_threads_behind()
