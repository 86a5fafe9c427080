"""Quantizes a model in many ways, and measures each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.ledger import Ledger, sha256_of
from benchmarks.materials import weights_sha256
from benchmarks.rows import Row
from quant.arithmetic import NonFiniteError
from quant.convert import quantize_checkpoint
from quant.files import sha256
from quant.format import CheckpointReader
from quant.llama import CheckpointError
from quant.tasks import read_questions, score_task
from quant.text import read_documents
from quant.tokenizer import read_tokenizer
from quant.tuned_scales import SCALES_FILE
from runtime.evaluate import TorchScorer, perplexity

PROBE = "A sentence to measure in passing."

Quantize = Callable[..., Any]

Measured = dict[Path, dict[str, Any]]
"""By the file that it was measured on: `perplexity` and `tokens`, or, for a task, the fields of `TaskResult`."""


class Bench:
    """Measures forms of one model on one text, and on tasks; what its ledger has is not measured again."""

    def __init__(
        self, model: Path, calibration: Path, heldout: Path, ledger: Ledger, quantize: Quantize = quantize_checkpoint
    ) -> None:
        """Opens the full-precision checkpoint `model`.

        Args:
            calibration: the file of text for static scales and GPTQ.
            heldout: the file of text for perplexity.
            quantize: tests give one of their own.

        Raises:
            CheckpointError: the model is not usable.
            OSError: a text cannot be read.
        """
        self.model, self.heldout = model, heldout
        self.config = CheckpointReader(model).config
        self._calibration, self._ledger, self._quantize = calibration, ledger, quantize
        self._source = self._read_source()

    def row(self, row: Row, tasks: Sequence[Path] = ()) -> Measured:
        """What the model comes to, quantized as `row` says.

        Raises:
            SchemeError: that makes no sense for the model.
            CheckpointError, TextError, NonFiniteError: as `quantize_checkpoint`, and for tasks `score_task`.
        """
        made_from = {**self._source, "scheme": row.scheme.to_dict(), "weights": row.weights}
        return self._measure(row.name, made_from, lambda scratch: self._quantized(row, scratch), tasks)

    def checkpoint(self, name: str, path: Path, tasks: Sequence[Path] = ()) -> Measured:
        """What the checkpoint at `path` comes to, in whatever form it is.

        Raises:
            CheckpointError, TextError: it, or a text, is not usable.
        """
        return self._measure(name, {"model": fingerprint(path)}, lambda _: path, tasks)

    def _quantized(self, row: Row, scratch: Path) -> Path:
        # The perplexity before is the same for all rows, and takes as long as the rest of a row. So quantize_checkpoint
        # gets next to nothing to measure on.
        probe = scratch / "probe.txt"
        probe.write_text(PROBE, encoding="utf-8")
        out = scratch / "quantized"
        texts = {"calibration": [self._calibration], "heldout": [probe]}
        self._quantize(self.model, out, row.scheme, weights=row.weights, **texts)
        if self._read_source() != self._source:  # a run takes hours, and its rows are to be of one model
            raise CheckpointError(self.model, "model or calibration text was changed during the run; start it again")
        return out

    def _read_source(self) -> dict[str, Any]:
        return {"model": fingerprint(self.model), "calibration": sha256(self._calibration)}

    def _measure(
        self, name: str, made_from: Mapping[str, Any], make: Callable[[Path], Path], tasks: Sequence[Path]
    ) -> Measured:
        keys = {file: sha256_of({**made_from, "measured on": sha256(file)}) for file in (self.heldout, *tasks)}
        missing = [file for file, key in keys.items() if key not in self._ledger]
        if missing:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                checkpoint = make(Path(scratch))
                for file in missing:
                    result = _perplexity(checkpoint, file) if file == self.heldout else _task(checkpoint, file)
                    self._ledger.keep(keys[file], f"{name} on {file.name}", result)
                    click.echo(f"{name}: {file.name}: {result}, {time.monotonic() - start:.0f} s", err=True)
        return {file: self._ledger.find(key) for file, key in keys.items()}


def fingerprint(checkpoint: Path) -> list[str]:
    """Hashes of all that determines what a checkpoint computes, and what it is quantized to.

    Raises:
        CheckpointError: it is not usable.
    """
    CheckpointReader(checkpoint)
    names = ["config.json", "tokenizer.json"]
    if (checkpoint / SCALES_FILE).exists():
        names += [SCALES_FILE, "osp.json"]  # which says for what scheme the scales were learned
    return [weights_sha256(checkpoint), *(sha256(checkpoint / name) for name in names)]


def _perplexity(checkpoint: Path, text: Path) -> dict[str, Any]:
    """Its perplexity, None where that is not finite, and the number of tokens."""
    try:
        measured = perplexity(TorchScorer(checkpoint), read_tokenizer(checkpoint), read_documents([text]))
    except NonFiniteError:
        return {"perplexity": None, "tokens": None}
    return {"perplexity": measured.value, "tokens": measured.tokens}


def _task(checkpoint: Path, file: Path) -> dict[str, Any]:
    """The fields of `TaskResult`; accuracies are None where a score is not finite."""
    scorer, tokenizer, questions = TorchScorer(checkpoint), read_tokenizer(checkpoint), read_questions(file)
    try:
        return asdict(score_task(file.stem, questions, tokenizer, scorer.context_length, scorer.log_likelihoods))
    except NonFiniteError:
        return {"task": file.stem, "accuracy": None, "accuracy_norm": None, "questions": len(questions)}
