"""`osp bench`: kernels and the whole engine against the machine's limits, servers against each other."""

from __future__ import annotations

import json
from typing import Any

import click

from runtime.bench.precision import DEFAULT_PRECISION
from runtime.bench.shapes import SHAPES
from runtime.loadtest.cli import load


@click.group(short_help="Measure speed: of kernels, of the whole engine, of servers.")
def bench() -> None:
    """Measure how fast the native engine is on this machine, beside what the machine can do, and servers under load."""


bench.add_command(load)


THREADS = click.option("--threads", type=click.IntRange(0), default=0, help="0: as many as the process may use.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@bench.command(short_help="Each kernel against the machine's bandwidth and dot products.")
@THREADS
@click.option("--kernel", "names", multiple=True, help="Only this kernel; may be repeated.")
@AS_JSON
def kernel(threads: int, names: tuple[str, ...], as_json: bool) -> None:
    """Measure matrix products of every kernel that this processor runs.

    Products of few rows read every weight once and are bound by memory (read_share), those of many rows by dot
    products (dot_share). The limits are measured first, by a loop that only reads and one that only multiplies.
    """
    from runtime.bench.kernel import measure_kernels, report  # numpy and the extension: not for `osp --help`
    from runtime.bench.limits import measure_limits

    library = _library()
    threads = threads or library.available_threads()
    known = library.available_kernels()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"no kernel {unknown[0]!r} here; this processor runs: {', '.join(known)}")
    limits = measure_limits(threads)
    rows = []
    if not as_json:
        click.echo(f"{threads} threads; limits: {limits.read_GBps:.1f} GB/s read, {limits.dot_GOPS:.0f} GOPS of int8")
        click.echo(f"{'kernel':<14}{'weights':<9}{'rows':>5}{'GB/s':>9}{'GOPS':>9}{'of read':>9}{'of dot':>8}")
    for row in measure_kernels(limits, threads, names or known):
        rows.append(row)
        if not as_json:
            click.echo(
                f"{row.kernel:<14}{row.weights:<9}{row.rows:>5}{row.read_GBps:>9.1f}{row.dot_GOPS:>9.0f}"
                f"{row.read_share:>9.2f}{row.dot_share:>8.2f}"
            )
    if as_json:
        click.echo(json.dumps(report(limits, threads, rows)))


@bench.command(short_help="Tokens a second of a model with random weights.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="demo", show_default=True, help="Sizes of the model.")
@click.option(
    "--precision",
    default=DEFAULT_PRECISION,
    show_default=True,
    help="bfloat16, or a scheme and bits of other sites after it; with the FFN Hadamard transform.",
)
@THREADS
@click.option("--kernel", "name", default="", help="A kernel by name; by default the best one.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Figures are medians of so many.")
@AS_JSON
def engine(shape: str, precision: str, threads: int, name: str, rounds: int, as_json: bool) -> None:
    """Measure decode (1, 8 and 16 sequences) and prefill (512 tokens) of the whole engine, weights made in memory."""
    from runtime.bench.engine import EngineBench, measure_engine
    from runtime.bench.limits import measure_limits

    _library()
    measured = EngineBench(shape, precision, threads, kernel=name)
    report = measure_engine(measured, measure_limits(measured.threads), rounds)
    click.echo(json.dumps(report) if as_json else _as_text(report))


def _library() -> Any:
    from runtime.engine.native_library import load_library

    return load_library()


def _as_text(report: dict[str, Any]) -> str:
    decode = ", ".join(f"{rate:.1f} at batch {batch}" for batch, rate in report["decode_tok_s"].items())
    return "\n".join(
        (
            f"{report['shape']}, {report['precision']}, kernel {report['kernel']}, {report['threads']} threads",
            f"decode   {decode} tokens/s; {report['decode_share']:.2f} of {report['read_GBps']:.1f} GB/s at batch 1",
            f"prefill  {report['prefill_tok_s']:.0f} tokens/s; {report['prefill_share']:.2f} of "
            f"{report['dot_GOPS']:.0f} GOPS",
            f"memory   {report['rss_MB']:.0f} MB; weights made in {report['load_s']:.1f} s",
        )
    )
