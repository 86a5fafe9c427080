"""Makes the tables of docs/quantization.md for one model: `python -m benchmarks.quantization --help`.

Every row is quantized into a temporary directory by `quant.convert`, and measured as `osp eval --engine torch` does.
What was measured is kept beside the output, in a file of JSON lines: a run that was cut off goes on, and the model
itself is measured once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click

from benchmarks.bench import Bench, Measured
from benchmarks.ledger import Ledger
from benchmarks.markdown import NOT_MEASURED, perplexity_cell, perplexity_table, section, task_cell
from benchmarks.rows import TASK_ROWS, Row, tables
from quant.arithmetic import NonFiniteError
from quant.format import CheckpointReader
from quant.llama import CheckpointError
from quant.scheme import SchemeError
from quant.text import TextError

SIXTEEN_BITS = "16 bits"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


def write_tables(
    bench: Bench,
    out: Path,
    *,
    command: str,
    patterns: Sequence[str] = ("*",),
    also: Mapping[str, Path] | None = None,
    tasks: Sequence[Path] = (),
) -> None:
    """Measures the rows and writes their tables in Markdown.

    Args:
        command: what to write into the first lines.
        patterns: the rows to measure are those with a name that fits one of them, as file names fit in a shell.
        also: other checkpoints, by name.
        tasks: files of tasks, which are put to the model, to `also` and to the rows of `TASK_ROWS`.

    Raises:
        ValueError: no row fits.
        NonFiniteError: the perplexity of the model itself is not finite.
        CheckpointError, TextError, SchemeError: as `Bench` raises them.
    """
    layout = tables(bench.config)
    chosen = _chosen([row for table in layout for row in table.rows()], patterns)
    forms = {SIXTEEN_BITS: bench.checkpoint(SIXTEEN_BITS, bench.model, tasks)}
    full = forms[SIXTEEN_BITS][bench.heldout]
    if full["perplexity"] is None:
        raise NonFiniteError(f"{bench.model}: the perplexity of the model itself is not finite")
    forms |= {name: bench.checkpoint(name, path, tasks) for name, path in (also or {}).items()}
    forms |= {row.name: bench.row(row, tasks if row.name in TASK_ROWS else ()) for row in chosen}

    perplexities = {name: measured[bench.heldout]["perplexity"] for name, measured in forms.items()}
    parts = [
        f"```\n{command}\n```\n",
        f"Perplexity, and its ratio to that of the model in 16 bits, which is {full['perplexity']:.2f}, on "
        f"{full['tokens']:,} tokens of `{bench.heldout.name}`.\n",
        *(
            perplexity_table(table, perplexities, full["perplexity"])
            for table in layout
            if any(row.name in perplexities for row in table.rows())
        ),
    ]
    if also:
        lines = {
            name: (_scheme_of(path), perplexity_cell(perplexities[name], full["perplexity"]))
            for name, path in also.items()
        }
        parts.append(section("Other checkpoints", "As they are.", ("checkpoint", "scheme", "perplexity"), lines))
    if tasks:
        parts.append(_task_section(forms, tasks))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts), encoding="utf-8")


def _chosen(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    chosen = {row.name: row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)}
    if not chosen:
        names = ", ".join(dict.fromkeys(row.name for row in rows))
        raise ValueError(f"no row is called {' or '.join(patterns)}; there are: {names}")
    return list(chosen.values())


def _scheme_of(path: Path) -> str:
    scheme = CheckpointReader(path).scheme
    return scheme.label if scheme else SIXTEEN_BITS


def _task_section(forms: Mapping[str, Measured], tasks: Sequence[Path]) -> str:
    columns = [f"{task.stem}{kind}" for task in tasks for kind in ("", ", per byte")]
    lines = {
        name: [
            task_cell(measured[task], key) if task in measured else NOT_MEASURED
            for task in tasks
            for key in ("accuracy", "accuracy_norm")
        ]
        for name, measured in forms.items()
        if any(task in measured for task in tasks)
    }
    counts = ", ".join(f"{forms[SIXTEEN_BITS][task]['questions']:,} of {task.stem}" for task in tasks)
    note = f"Right answers in percent, with standard errors; questions: {counts}."
    return section("Tasks", note, ("", *columns), lines)


def _named_directory(_context: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, Path]:
    pairs = [value.partition("=") for value in values]
    for name, equals, path in pairs:
        if not name or not equals:
            raise click.BadParameter(f"NAME=DIR is wanted, not {name}{equals}{path}")
        DIRECTORY.convert(path, _parameter, _context)
    return {name: Path(path) for name, _, path in pairs}


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option("--calibration", type=FILE, required=True, help="Text for static scales and GPTQ.")
@click.option("--eval", "heldout", type=FILE, required=True, help="Text to measure perplexity on.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Markdown file to write.")
@click.option("--rows", multiple=True, default=("*",), help="Only rows with such a name, 'w4a4*' for example.")
@click.option("--also", multiple=True, callback=_named_directory, metavar="NAME=DIR", help="A checkpoint, as it is.")
@click.option("--task", "tasks", type=FILE, multiple=True, help="Questions for some of the rows, as in osp eval.")
def main(
    model: Path,
    calibration: Path,
    heldout: Path,
    out: Path,
    rows: tuple[str, ...],
    also: dict[str, Path],
    tasks: tuple[Path, ...],
) -> None:
    """Quantize MODEL in every way that docs/quantization.md has a row for, and write the tables."""
    command = shlex.join(["python", "-m", "benchmarks.quantization", *sys.argv[1:]])
    try:
        ledger = Ledger(out.with_suffix(".jsonl"))
        bench = Bench(model, calibration, heldout, ledger)
        write_tables(bench, out, command=command, patterns=rows, also=also, tasks=tasks)
    except (CheckpointError, TextError, SchemeError, NonFiniteError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if ledger.outdated:
        click.echo(
            f"measured before the sources of quant were changed: {', '.join(ledger.outdated)}; "
            f"remove {ledger.path} to measure again",
            err=True,
        )


if __name__ == "__main__":
    main()
