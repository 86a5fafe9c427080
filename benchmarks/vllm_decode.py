"""Decode in vLLM: our W4A4 through the plugin, beside vLLM's own W4A16 and bfloat16, on one machine, in turn:

    build/vllm/bin/python -m benchmarks.vllm_decode --out build/vllm-decode/table.json

Runs where vLLM is installed (`make test-vllm` makes such an environment). The three checkpoints have random weights of
one shape and are written on the first run: ours with a 4-bit head and embedding; what `osp export --format
compressed-tensors` makes of a W4A16 one, whose head has 4 bits too, since no stock engine reads a 4-bit embedding; and
the same shape in bfloat16. Each is loaded by a vLLM of its own, whole models with scheduler and sampler; those that are
not measured are stopped. On a machine with two cores vLLM gives its model one of them and keeps the other for its
scheduler, hence one thread. vLLM compiles the model, as it does by default; with `--eager` it does not, starts sooner,
and spends half of a step between the products. `--engines` leaves some out. Absolute rates hold for the machine and the
hour only; ratios are taken within a round.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.alternation import alternate
from benchmarks.comparison import Comparison
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.worker_process import WorkerError, WorkerProcess
from benchmarks.workloads import Decode, Prefill, Row
from quant.export import export_checkpoint
from quant.scheme import Scheme, named
from runtime.bench.precision import DEFAULT_PRECISION, scheme_of
from runtime.bench.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "vllm-decode"
OURS, W4A16, BF16 = "osp-w4a4", "vllm-w4a16", "vllm-bf16"
GOALS = {W4A16: 3.0, BF16: 3.0}


def rows(tokens: int) -> list[Row]:
    """What is measured: some streams that decode `tokens` tokens each, after a short prompt, and a long prompt."""
    return [
        *(
            Row(f"decode-{batch}", f"decode, batch {batch}", Decode(tokens, batch, context=32), goals=GOALS)
            for batch in (1, 4, 16)
        ),
        Row("prefill-384", "prefill, 384 tokens", Prefill(384)),
    ]


def checkpoint(name: str, shape: str) -> Path:
    """The directory of the engine's checkpoint; written if it is not there."""
    path = BUILD / f"{shape}-{name}"
    if path.exists():
        return path
    if name != W4A16:
        write_random_checkpoint(path, SHAPES[shape], scheme_of(DEFAULT_PRECISION) if name == OURS else None)
        return path
    source = BUILD / f"{shape}-{name}-source"
    if not source.exists():
        write_random_checkpoint(source, SHAPES[shape], _stock_scheme())
    export_checkpoint(source, path)
    return path


def _stock_scheme() -> Scheme:
    """W4A16 with a 4-bit head, in what a stock engine reads: no Hadamard transform, a 16-bit embedding."""
    return named("w4a16").changed(hadamard="none", embedding_bits=16, head=4)


def start_worker(name: str, shape: str, threads: int, *, eager: bool) -> WorkerProcess:
    """A vLLM of its own, with the engine's checkpoint loaded.

    Raises:
        WorkerError: it does not load.
    """
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.vllm_worker", "--shape", shape]
    command += ["--threads", str(threads), "--directory", BUILD, "--checkpoint", checkpoint(name, shape)]
    command += ["--eager"] * eager
    return WorkerProcess(name, command, BUILD / f"{name}.log", directory=ROOT)


def compare(
    names: Sequence[str], comparison: Comparison, write: Callable[[], None], *, tokens: int, eager: bool
) -> None:
    """Starts the engines, and measures every row into the comparison.

    Raises:
        WorkerError, ValueError: as `benchmarks.alternation.alternate` raises them.
    """
    with ExitStack() as stack:
        workers = [
            stack.enter_context(start_worker(name, comparison.shape, comparison.threads, eager=eager)) for name in names
        ]
        comparison.engines = {worker.name: worker.about for worker in workers}
        for row in rows(tokens):
            comparison.series.append(alternate(row, workers, comparison.rounds))
            comparison.rss_mb = {worker.name: worker.rss_mb() for worker in workers}
            write()


def _engines_named(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names, known = value.split(","), (OURS, W4A16, BF16)
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"no engine is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return names


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=BUILD / "table.json", show_default=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of every vLLM: see above.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(1, 256), default=64, show_default=True, help="Decoded by each stream.")
@click.option("--engines", callback=_engines_named, default=f"{OURS},{W4A16},{BF16}", show_default=True)
@click.option("--eager", is_flag=True, help="Without torch.compile.")
def main(out: Path, shape: str, threads: int, rounds: int, tokens: int, engines: list[str], *, eager: bool) -> None:
    """Measure decode in vLLM, our W4A4 beside vLLM's own engines, and write the comparison."""
    command = shlex.join(["python", "-m", "benchmarks.vllm_decode", *sys.argv[1:]])
    comparison = Comparison(command, shape, threads, rounds, engines[0])

    def write() -> None:
        comparison.write(out)
        click.echo(f"{comparison.series[-1].row.name}: measured", err=True)

    try:
        compare(engines, comparison, write, tokens=tokens, eager=eager)
    except (WorkerError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(comparison.markdown())


if __name__ == "__main__":
    main()
