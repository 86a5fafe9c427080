"""`osp bench load`."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

KINDS = ("random", "text", "shared-prefix", "multi-turn")


def _service_level(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:  # noqa: ARG001 - click's
    """`ttft:2000` and the like, in milliseconds, as `vllm bench serve` takes it."""
    limits = {}
    for value in values:
        name, _, limit = value.partition(":")
        try:
            limits[f"{name}_ms"] = float(limit)
        except ValueError:
            limits[f"{name}_ms"] = math.nan
        if name not in ("ttft", "tpot") or not limits[f"{name}_ms"] > 0:
            raise click.BadParameter(f"{value!r} is not ttft:MS or tpot:MS")
    return limits


def _json_object(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:  # noqa: ARG001 - click's
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise click.BadParameter(f"{value!r} is no JSON object")
    return parsed


@click.command(short_help="One server under load, or two, one against the other.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Directory of the report.")
@click.option("--dataset-name", type=click.Choice(KINDS), default="random", show_default=True, help="What is asked.")
@click.option("--dataset-path", multiple=True, type=click.Path(path_type=Path), help="Text of --dataset-name text.")
@click.option("--num-prompts", type=click.IntRange(1), default=64, show_default=True, help="Requests of a repeat.")
@click.option("--random-input-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--random-output-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--random-prefix-len", type=click.IntRange(0), default=0, help="Tokens that all prompts begin with.")
@click.option("--turns", type=click.IntRange(1), default=1, help="Requests of a conversation.")
@click.option("--request-rate", type=float, default=math.inf, help="Requests a second; inf (default): closed loop.")
@click.option("--burstiness", type=float, default=1.0, show_default=True, help="1: Poisson; less: bursts; more: even.")
@click.option("--max-concurrency", type=click.IntRange(1), help="Requests at a time; 16 in a closed loop.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of prompts and arrivals.")
@click.option("--num-warmups", type=click.IntRange(0), default=4, show_default=True, help="Requests before a repeat.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Loads of each side, in turns.")
@click.option(
    "--goodput", multiple=True, callback=_service_level, help="ttft:MS, tpot:MS; default ttft:2000, tpot:100."
)
@click.option("--prefix-cache", is_flag=True, help="Let servers reuse what they computed for earlier prompts.")
@click.option("--placement", type=click.Choice(("alternate", "halves")), default="alternate", show_default=True)
@click.option("--sweep-seconds", type=click.FloatRange(0), default=20.0, show_default=True, help="A rate; 0: no sweep.")
@click.option("--quality-data", multiple=True, type=click.Path(path_type=Path), help="Held-out text.")
@click.option("--quality-tokens", type=click.IntRange(1), default=20_000, show_default=True, help="Scored at most.")
@click.option("--model-a", help="Which of the models of A's server; by default the first.")
@click.option("--model-b", help="Which of the models of B's server.")
@click.option("--engine", default="auto", show_default=True, help="Of the servers that are started.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Of the servers that are started; 0: all cores.")
@click.option("--kernel", default="", help="Of the servers that are started.")
@click.option("--request-timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds.")
@click.option("--extra-body", default="{}", callback=_json_object, help="Fields of every request, as a JSON object.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def load(**options: Any) -> None:
    """Put A under load, or A and B in turns, and say how A compares: speed, latency, memory, quality.

    A and B are MODELs (a directory, a Hugging Face name, a bundled name), for which a server is started, or URLs of
    OpenAI-compatible servers, whose keys are read from OPENAI_API_KEY, or OPENAI_API_KEY_A and OPENAI_API_KEY_B.

    DIRECTORY/result.json has everything, report.html and report.md show it. By default DIRECTORY is loadtest- and the
    time. Names of options and figures are those of `vllm bench serve`.
    """
    # Not at the top: `osp --help` shows this command too, and it needs aiohttp.
    from runtime.loadtest.endpoint import EndpointError
    from runtime.loadtest.load_test import LoadTest
    from runtime.loadtest.progress import Progress
    from runtime.loadtest.report import write_report
    from runtime.loadtest.summary import as_text
    from runtime.loadtest.workload import WorkloadError

    try:
        test = LoadTest(_targets(options), _settings(options), Progress(visible=sys.stderr.isatty()))
        result = test.run()
    except (EndpointError, WorkloadError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.Abort from None
    out = options["out"] or Path(f"loadtest-{datetime.now():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    written = result.to_dict()
    (out / "result.json").write_text(json.dumps(written, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(written, out)
    click.echo(json.dumps(result.summary(), ensure_ascii=False) if options["as_json"] else as_text(result))
    click.echo(f"written to {out}", err=True)
    if result.invalid_reasons:
        raise SystemExit(1)


def _targets(options: dict[str, Any]) -> list[Any]:
    from runtime.loadtest.load_test import Target

    named = [("A", options["a"], options["model_a"]), ("B", options["b"], options["model_b"])]
    return [Target(name, model, _headers(letter)) for letter, name, model in named if name is not None]


def _headers(letter: str) -> dict[str, str]:
    key = os.environ.get(f"OPENAI_API_KEY_{letter}") or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _settings(options: dict[str, Any]) -> Any:
    from runtime.loadtest.figures import ServiceLevel
    from runtime.loadtest.load_test import LoadTestSettings
    from runtime.loadtest.workload import Workload, WorkloadError

    rate = options["request_rate"]
    if not rate > 0:
        raise WorkloadError("--request-rate must be positive")
    closed = math.isinf(rate)
    workload = Workload(
        kind=options["dataset_name"],
        num_prompts=options["num_prompts"],
        input_len=options["random_input_len"],
        output_len=options["random_output_len"],
        prefix_len=options["random_prefix_len"],
        turns=options["turns"],
        request_rate=None if closed else rate,
        burstiness=options["burstiness"],
        max_concurrency=options["max_concurrency"] or (16 if closed else None),
        seed=options["seed"],
        repeats=options["repeats"],
        warmups=options["num_warmups"],
        prefix_cache=options["prefix_cache"],
        slo=ServiceLevel(**options["goodput"]),
        documents=options["dataset_path"],
    )
    kernel = ["--kernel", options["kernel"]] if options["kernel"] else []
    return LoadTestSettings(
        workload=workload,
        command=shlex.join(["osp", *sys.argv[1:]]),
        serve_arguments=["--engine", options["engine"], "--threads", str(options["threads"]), *kernel],
        placement=options["placement"],
        sweep_seconds=options["sweep_seconds"],
        quality_data=options["quality_data"],
        quality_tokens=options["quality_tokens"],
        timeout_s=options["request_timeout"],
        extra_body=options["extra_body"],
    )
