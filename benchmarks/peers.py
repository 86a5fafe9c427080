"""The native engine against its peers, on one machine, in turn:

    python -m benchmarks.peers --out build/peers/table.json

Needs pip, a C++ compiler and cmake: llama.cpp is compiled here, for this processor, which takes some minutes once.
Every peer lives in an environment of its own under `build/peers/`, and in a process of its own; processes that are not
measured are stopped. All of them have random weights of one shape:

- llama.cpp computes the whole model from a GGUF file in Q4_0;
- OpenVINO and ONNX Runtime compute the model's matrix products alone, with int4 weights. The native engine computes
  its whole step even there, so that it does more than they do;
- osp-bf16, on demand, is the native engine with bfloat16 weights.

The rows, and what they aim at, are those of `benchmarks.workloads`; `--rows 'decode-*'` and `--peers llama.cpp` choose.
Each row has a turn that does not count, and then `--rounds` rounds. JSON goes to `--out` after every row, Markdown
beside it, so that a run that is cut off leaves what it has. Absolute rates hold for the machine and the hour only;
ratios are taken within a round.
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
from benchmarks.neighbour import NeighbourError
from benchmarks.peer_environments import OURS, PEERS, InstallError, Peer
from benchmarks.worker_process import WorkerError, WorkerProcess
from benchmarks.workloads import Row, rows_named
from runtime.bench.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "peers"
JSON_FILE = click.Path(dir_okay=False, path_type=Path)


def compare(peers: Sequence[Peer], rows: Sequence[Row], comparison: Comparison, write: Callable[[], None]) -> None:
    """Starts our engine and the peers, and measures the rows into the comparison.

    Args:
        peers: installed.
        write: called after each row.

    Raises:
        WorkerError, NeighbourError, ValueError: as `benchmarks.alternation.alternate` raises them.
        OSError: a worker cannot be started.
    """
    with ExitStack() as stack:
        workers = {
            peer.name: stack.enter_context(start_worker(peer, comparison.shape, comparison.threads))
            for peer in (OURS, *peers)
        }
        comparison.engines = {name: worker.about for name, worker in workers.items()}
        ours = workers[OURS.name]
        limits = (lambda: ours.ask({"measure": "limits"})) if "limits" in ours.measures else None
        for row in rows:
            able = [workers[peer.name] for peer in (OURS, *peers) if peer.whole_model or not row.needs_whole_model]
            comparison.series.append(alternate(row, able, comparison.rounds, limits=limits))
            comparison.rss_mb = {name: worker.rss_mb() for name, worker in workers.items()}
            write()


def start_worker(peer: Peer, shape: str, threads: int) -> WorkerProcess:
    """The peer's process, with a model of that shape loaded.

    Raises:
        WorkerError: it does not load.
        OSError: it cannot be started.
    """
    directory = BUILD / peer.name
    command: list[str | Path] = [peer.python(BUILD), "-m", peer.module, "--shape", shape, "--threads", str(threads)]
    log = directory / "worker.log"
    return WorkerProcess(peer.name, [*command, "--directory", directory, *peer.options], log, directory=ROOT)


def _peers_named(_context: click.Context, _parameter: click.Parameter, value: str) -> list[Peer]:
    names = value.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"no peer is called {', '.join(unknown)}; there are: {', '.join(PEERS)}")
    return [PEERS[name] for name in names]


def _rows_named(_context: click.Context, _parameter: click.Parameter, value: str) -> list[Row]:
    try:
        return rows_named(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option("--out", type=JSON_FILE, default=BUILD / "table.json", show_default=True, help="JSON file to write.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.4b", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="For every engine.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--peers", callback=_peers_named, default="llama.cpp,openvino,onnxruntime", show_default=True)
@click.option("--rows", callback=_rows_named, default="*", show_default=True, help="Only rows with such a name.")
@click.option("--install-only", is_flag=True, help="Install the peers, and measure nothing.")
def main(
    out: Path, shape: str, threads: int, rounds: int, peers: list[Peer], rows: list[Row], install_only: bool
) -> None:
    """Measure the native engine and its peers in turn, and write the comparison."""
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    comparison = Comparison(command, shape, threads, rounds, OURS.name)

    def write() -> None:
        comparison.write(out)
        click.echo(f"{comparison.series[-1].row.name}: measured", err=True)

    try:
        for peer in peers:
            if not peer.installed(BUILD):
                click.echo(f"{peer.name}: installing {', '.join(peer.requirements)}", err=True)
                peer.install(BUILD)
        if not install_only:
            compare(peers, rows, comparison, write)
            click.echo(comparison.markdown())
    except (InstallError, NeighbourError, WorkerError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
