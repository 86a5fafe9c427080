"""Whether `osp bench load` and `vllm bench serve` say the same of one server under the same load, in turns.

    osp serve demo --port 8000 &
    python -m benchmarks.loadtest_against_vllm http://127.0.0.1:8000 --python VENV/bin/python \\
        --tokenizer runtime/models/demo

Both send requests of the same lengths, at the same rate; with `--burstiness inf` at the same moments, else at random
ones. The tokens are random and differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.markdown import section

# What `vllm bench serve` runs. The program itself asks for a package called vllm, and CPU builds have other names.
SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

FIGURES = ("output_throughput", "median_ttft_ms", "mean_ttft_ms", "median_tpot_ms", "mean_tpot_ms", "median_itl_ms")


def ours(url: str, load: list[str], folder: Path) -> dict[str, Any]:
    """The figures of `osp bench load`, of one repeat."""
    arguments = [*load, "--repeats", "1", "--sweep-seconds", "0", "--json", "--out", str(folder / "ours")]
    command = [sys.executable, "-m", "runtime.cli", "bench", "load", url, *arguments]
    # It exits with 1 where the load is not valid: the figures are there all the same, and the reason with them.
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    result = json.loads(answer.stdout)
    for reason in result["invalid_reasons"]:
        click.echo(f"not valid: {reason}", err=True)
    return dict(result["A"])


def theirs(python: str, url: str, load: list[str], model: str, tokenizer: str, folder: Path) -> dict[str, Any]:
    """The figures of `vllm bench serve`."""
    command = [python, "-c", SERVE, "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"]
    command += ["--model", model, "--tokenizer", tokenizer, "--dataset-name", "random", "--ignore-eos", *load]
    command += ["--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", str(folder)]
    subprocess.run([*command, "--result-filename", "theirs.json"], stdout=subprocess.DEVNULL, check=True)
    return dict(json.loads((folder / "theirs.json").read_text("utf-8")))


@click.command()
@click.argument("url")
@click.option("--python", required=True, help="Of an environment with vLLM.")
@click.option("--model", default="demo", show_default=True, help="As the server calls it.")
@click.option("--tokenizer", required=True, help="A directory that transformers reads a tokenizer from.")
@click.option("--request-rate", default="4", show_default=True)
@click.option("--burstiness", default="1", show_default=True, help="1: Poisson; inf: even.")
@click.option("--num-prompts", default="80", show_default=True)
@click.option("--random-input-len", default="128", show_default=True)
@click.option("--random-output-len", default="64", show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
def main(url: str, python: str, model: str, tokenizer: str, rounds: int, **options: str) -> None:
    """Print the medians of the rounds, and the median of their ratios."""
    # Both programs call these options so.
    load = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    load += ["--num-warmups", "4", "--seed", "0"]
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in FIGURES}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            a, b = ours(url, load, Path(name)), theirs(python, url, load, model, tokenizer, Path(name))
            for figure in FIGURES:
                rows[figure].append((a[figure], b[figure]))
    lines = {
        figure: [
            f"{median(a for a, _ in pairs):.2f}",
            f"{median(b for _, b in pairs):.2f}",
            f"{median(a / b for a, b in pairs):.3f}",
        ]
        for figure, pairs in rows.items()
    }
    click.echo(section("Two clients of one server", "", ["", "osp bench load", "vllm bench serve", "ratio"], lines))


if __name__ == "__main__":
    main()
