"""How well an engine predicts text: perplexity, and what scores windows of tokens for it and for `quant.tasks`.

The conventions are those of `quant.text` and `quant.tasks`, so that a figure is the quantizer's where the engine
computes the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quant.format import CheckpointReader
from quant.tasks import ScoredWindow
from quant.text import Perplexity, windows
from runtime.engine.registry import RUNNERS, EngineOptions, UnknownEngineError, check_provider, load_runner
from runtime.engine.runner import ModelRunner, SequenceSlice

LOGIT_ROWS = 128
"""Rows of logits that are held at a time: all those of a long context times a large vocabulary are too many."""

TORCH_BATCH_TOKENS = 2**16
"""Tokens whose hidden states the quantizer's simulation holds at a time; for each such batch it reads all weights."""

EVALUATION_ENGINES = (*RUNNERS, "torch")
"""The names that `load_scorer` knows: the engines, and the quantizer's simulation, which serves nobody."""

Progress = Callable[[int], None]
"""Is told, now and then, how many tokens have been scored so far."""


class NothingToScoreError(ValueError):
    """No document has two tokens."""


class Scorer(Protocol):
    """Scores windows of tokens; `engine` and `precision` are as in `EngineInfo`."""

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def context_length(self) -> int: ...

    def log_likelihoods(self, windows: Iterable[ScoredWindow]) -> Iterator[NDArray[np.float64]]:
        """See `quant.tasks.LogLikelihoods`."""
        ...


def load_scorer(
    name: str, path: Path, progress: Progress | None = None, options: EngineOptions | None = None
) -> Scorer:
    """Loads a checkpoint directory for evaluation by the engine called `name`.

    Raises:
        UnknownEngineError: no such engine; raised before anything is read.
        OnnxProviderError: as `runtime.engine.registry.load_engine`.
        CheckpointError: `path` is not a usable checkpoint.
        ModuleNotFoundError: the engine is torch, and torch is not installed.
    """
    if name not in EVALUATION_ENGINES:
        raise UnknownEngineError(name, EVALUATION_ENGINES)
    if name == "torch":
        check_provider(name, options or EngineOptions())
        return TorchScorer(path, progress)
    return RunnerScorer(load_runner(name, path, options), progress)


def perplexity(scorer: Scorer, tokenizer: Tokenizer, documents: Iterable[str]) -> Perplexity:
    """The model's perplexity on `documents`.

    Raises:
        NothingToScoreError: no document has two tokens.
        NonFiniteError: it is NaN or infinite.
    """
    total, tokens = 0.0, 0
    encoded = (tokenizer.encode(document).ids for document in documents)
    cut = (ScoredWindow(tuple(window), len(window) - 1) for window in windows(encoded, scorer.context_length))
    for scores in scorer.log_likelihoods(cut):
        total -= float(scores.sum())
        tokens += len(scores)
    if not tokens:
        raise NothingToScoreError("there is nothing to score: no document has two tokens")
    return Perplexity.from_sum(total, tokens)


class RunnerScorer:
    """Scores by a local engine's runner. Implements `Scorer`."""

    def __init__(self, runner: ModelRunner, progress: Progress | None = None) -> None:
        """`runner` is used by nobody else meanwhile; its KV blocks are overwritten."""
        self.engine, self.precision = runner.info.engine, runner.info.precision
        self.context_length, capacity = runner.info.context_length, runner.num_blocks * runner.block_size
        if capacity < self.context_length:
            raise ValueError(f"a KV cache of {capacity} positions cannot hold the context of {self.context_length}")
        self._runner, self._progress = runner, progress

    def log_likelihoods(self, windows: Iterable[ScoredWindow]) -> Iterator[NDArray[np.float64]]:
        """See `Scorer.log_likelihoods`."""
        total = 0
        for inputs, group in itertools.groupby(windows, lambda window: window.token_ids[:-1]):
            alike = list(group)
            scored = max(window.scored for window in alike)
            targets_WN = np.array([window.token_ids[-scored:] for window in alike])
            scores_WN = np.concatenate(list(self._scores(inputs, targets_WN)), axis=1)
            for window, scores_N in zip(alike, scores_WN, strict=True):
                yield scores_N[scored - window.scored :]
                total += window.scored
            if self._progress:
                self._progress(total)

    def _scores(self, inputs: tuple[int, ...], targets_WN: NDArray[np.integer]) -> Iterator[NDArray[np.float64]]:
        """Of several windows W with the same inputs, the scores of their last N tokens, in parts along N."""
        block_table = np.arange(self._runner.num_blocks, dtype=np.int32)
        first = len(inputs) - targets_WN.shape[1]  # the position whose logits score the first target
        for start in range(0, len(inputs), LOGIT_ROWS):
            ids_L = np.array(inputs[start : start + LOGIT_ROWS], np.int32)
            end = start + len(ids_L)
            wanted = max(0, min(len(ids_L), end - first))
            logits_NV = self._runner.step([SequenceSlice(ids_L, start, block_table, wanted)]).rows().astype(np.float64)
            highest_N = logits_NV.max(axis=-1)
            log_sums_N = highest_N + np.log(np.exp(logits_NV - highest_N[:, None]).sum(axis=-1))
            part_WN = targets_WN[:, end - wanted - first : end - first]
            yield logits_NV[np.arange(wanted), part_WN] - log_sums_N


class TorchScorer:
    """Scores by the quantizer's simulation, which needs torch and runs a block at a time. Implements `Scorer`."""

    engine = "torch"

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        # Imported here: this package needs no torch but for this one class.
        from quant.stream import log_likelihoods

        self._log_likelihoods, self._progress = log_likelihoods, progress
        self._reader = CheckpointReader(path)
        self.context_length = self._reader.config.max_position_embeddings
        scheme = self._reader.scheme
        self.precision = scheme.label if scheme else str(self._reader.norm("model.norm.weight").dtype)

    def log_likelihoods(self, windows: Iterable[ScoredWindow]) -> Iterator[NDArray[np.float64]]:
        """See `Scorer.log_likelihoods`."""
        total = 0
        for batch in _batches(windows, TORCH_BATCH_TOKENS):
            ids, scored = [list(window.token_ids) for window in batch], [window.scored for window in batch]
            yield from self._log_likelihoods(self._reader, ids, scored=scored)
            total += sum(scored)
            if self._progress:
                self._progress(total)


def _batches(windows: Iterable[ScoredWindow], tokens: int) -> Iterator[list[ScoredWindow]]:
    """Consecutive windows of about so many tokens together."""
    batch: list[ScoredWindow] = []
    held = 0
    for window in windows:
        batch.append(window)
        held += len(window.token_ids)
        if held >= tokens:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
