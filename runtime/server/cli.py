"""`osp serve`."""

from __future__ import annotations

import logging
from typing import Any

import click

from runtime.server.settings import read_settings, settings_options


@click.command(short_help="Serve a model over an OpenAI-compatible HTTP API.")
@settings_options(positional="model")
def serve(**options: Any) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API.

    MODEL is a directory, a Hugging Face name (owner/name, which is downloaded) or the name of a bundled model; left
    out, it is the bundled demo model. Every option can also be set in the environment, as OSP_ and its name:
    OSP_PORT=9000.
    """
    settings = read_settings(options)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("runtime").setLevel(settings.log_level.upper())
    # Not at the top: `osp --help` shows this command too, and need not load a web server for it.
    from runtime.server.lifecycle import StartError, run_server

    try:
        run_server(settings)
    except StartError as error:
        raise click.ClickException(str(error)) from error
