"""The paper's ablation: what each part of the recipe does to outliers, and to the model in 4 bits.

Six recipes are trained from one seed on the same batches, one after the other; each is measured, and quantized in
several ways. The directory of an ablation holds

    ablation.json    the settings, and what is measured so far (see `Ablation.run`)
    ablation.md      the same as a table
    data/            the corpus, prepared once (`data.py`)
    RECIPE/          a run directory as `osp train` leaves it, and a checkpoint of each of the `FORMS`

What is finished is not done again: an ablation that was cut off goes on from the last checkpoint of the recipe that
was training, or with the quantization that was under way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.convert import quantize_checkpoint
from quant.scheme import Scheme, named
from trainer.ablation_report import as_markdown
from trainer.atomic_file import replace_json, replacing
from trainer.checkpoints import checkpoints
from trainer.config import RECIPES, ConfigError, Recipe, TrainConfig, changed_settings
from trainer.data import TokenStreams, held_out_windows, prepare
from trainer.loop import LOG_EVERY, Trainer
from trainer.outliers import measure_outliers, single_tokens
from trainer.train import train_on

RESULT_FILE, TABLE_FILE = "ablation.json", "ablation.md"

BODY_AND_CACHE = {"kv_bits": 4, "head": 16, "embedding_bits": 16}
"""The paper's 4-4-4: weights and inputs of the blocks' matrices, and the KV cache; not the head and the embedding."""

FORMS: dict[str, Scheme] = {
    "w4a4": named("w4a4").changed(**BODY_AND_CACHE),
    "w4a4-ffn": named("w4a4").changed(**BODY_AND_CACHE, hadamard="ffn"),
    "w4a4-token": named("w4a4-token").changed(**BODY_AND_CACHE),
}
"""What each model is quantized to, rounded to nearest: one static scale a tensor, without and with the Hadamard
transform in front of down_proj; and a scale an output channel and a token, as the paper has it."""

CURVE_POINTS = 25
"""Into how many parts a run is divided, at most, for the curve of its kurtosis and for its checkpoints."""

SINGLE_TOKENS = 4096
"""Tokens of the held-out text that are looked at one by one."""


class Ablation:
    """One ablation in its directory."""

    def __init__(self, paths: Sequence[str], directory: Path, config: TrainConfig) -> None:
        """Takes the corpus (see `data_sources`), and the settings that all recipes share; `config.recipe` is not
        looked at, and evaluations and checkpoints are as frequent as the curve wants them.

        Raises:
            ConfigError: `directory` holds an ablation with other settings; the message names them.
        """
        every = LOG_EVERY * max(1, config.steps // (LOG_EVERY * CURVE_POINTS))
        checkpoint_every = min(config.checkpoint_every, every)
        config = replace(config, eval_every=min(config.eval_every, every), checkpoint_every=checkpoint_every)
        self.paths, self.directory, self.config = paths, directory, config
        self.result: dict[str, Any] = {"settings": _shared_settings(config), "recipes": {}}
        if (file := directory / RESULT_FILE).exists():
            self.result = _read_result(file, self.result["settings"])

    def run(self, *, quiet: bool = False) -> dict[str, Any]:
        """Trains, measures and quantizes what is not finished, with progress bars on stderr unless `quiet`.

        Returns:
            The content of ablation.json: `settings`, and `recipes` {name: {`held_out_loss` (nats a token),
            `excess_kurtosis` (of the residual stream, mean over blocks) {`in_context`, `single_tokens`}, `absmax`,
            `perplexity` {"16-bit" and each of `FORMS`; None where it is not finite}, `ratio` {form: perplexity over
            the 16-bit one, or None}, `curve` [[step, excess kurtosis in context], …]}}.

        Raises:
            TextError, DataError, ConfigError, TrainingError, TrainingStoppedError: as `trainer.train.train`.
            SchemeError: the Hadamard transform does not fit the model's shape.
            NonFiniteError: a trained model is not finite.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        data = self.directory / "data"
        streams = prepare(self.paths, data, self.config, resume=(data / "data.json").exists())
        self._write()
        for recipe in RECIPES:
            if recipe not in self.result["recipes"]:
                self.result["recipes"][recipe] = self._outcome(recipe, streams, quiet)
                self._write()
        return self.result

    def _write(self) -> None:
        replace_json(self.directory / RESULT_FILE, self.result)
        with replacing(self.directory / TABLE_FILE) as file:
            file.write(as_markdown(self.result).encode())

    def _outcome(self, recipe: Recipe, streams: TokenStreams, quiet: bool) -> dict[str, Any]:
        directory = self.directory / recipe
        directory.mkdir(exist_ok=True)
        config = replace(self.config, recipe=recipe)
        trained = _finished_training(directory) or train_on(streams, directory, config, quiet=quiet)
        quality = {form: self._quality(directory, form, quiet) for form in FORMS}
        full = quality["w4a4"]["perplexity_16bit"]  # each form says the same of the model that it was made from
        return {
            "held_out_loss": trained["held_out_loss"],
            "excess_kurtosis": {
                "in_context": trained["excess_kurtosis"],
                "single_tokens": _single_token_kurtosis(config, directory, streams),
            },
            "absmax": trained["absmax"],
            "perplexity": {"16-bit": full, **{form: of["perplexity"] for form, of in quality.items()}},
            "ratio": {form: of["ratio"] for form, of in quality.items()},
            "curve": _curve(directory, trained["settings"]["eval_every"]),
        }

    def _quality(self, directory: Path, form: str, quiet: bool) -> dict[str, Any]:
        """What osp.json of the quantized form says of its quality; it is made, unless it is there."""
        out = directory / form
        if (out / "osp.json").exists():  # a quantized checkpoint appears whole or not at all
            report = json.loads((out / "osp.json").read_text("utf-8"))
        else:
            data = self.directory / "data"
            report = quantize_checkpoint(
                directory / "final",
                out,
                FORMS[form],
                calibration=[data / "calibration.jsonl"],
                heldout=[data / "held_out.jsonl"],
                progress=not quiet,
                resume=True,
            )
        return dict(report["quality"])


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that are the same for all six."""
    return {name: value for name, value in config.to_dict().items() if name != "recipe"}


def _read_result(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        result = dict(json.loads(file.read_text("utf-8")))
        changed = changed_settings(result["settings"], settings)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{file} is damaged ({error!r}); choose another --out") from None
    if changed:
        raise ConfigError(
            f"{file.parent} holds an ablation with other settings ({'; '.join(changed)}); go on with the settings of "
            "then, or choose another --out"
        )
    return result


def _finished_training(directory: Path) -> dict[str, Any] | None:
    """What a training that has ended recorded; osp.json is the last file that an export writes."""
    try:
        return dict(json.loads((directory / "final" / "osp.json").read_text("utf-8"))["training"])
    except (FileNotFoundError, ValueError):  # not there, or cut off: the checkpoint of the last step exports again
        return None


def _single_token_kurtosis(config: TrainConfig, directory: Path, streams: TokenStreams) -> float:
    """Excess kurtosis as the paper's published evaluation measures it: every token is a sequence of its own."""
    trainer = Trainer.start(config, directory, streams)
    trainer.restore(checkpoints(directory)[-1])
    trainer.model.eval()
    windows_BL = held_out_windows(streams.held_out, config.model.context_length, config.eval_tokens)
    ids_N1 = single_tokens(windows_BL[:, :-1], SINGLE_TOKENS)
    return measure_outliers(trainer.model, ids_N1)["residual"].mean_kurtosis


def _curve(directory: Path, eval_every: int) -> list[list[float]]:
    """[step, excess kurtosis in context] of each evaluation; the lines between two repeat the former."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluated = [line for line in lines if line["step"] % eval_every == 0 or line is lines[-1]]
    return [[line["step"], line["excess_kurtosis"]] for line in evaluated]
