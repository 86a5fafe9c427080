"""lm-eval's `local-completions` gives a model the same scores as transformers does.

It comes with the extra `clients`, and half a gigabyte of packages; without it this test is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import END, write_byte_level_tokenizer, write_full_precision
from server_process import running_server
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

evaluator = pytest.importorskip("lm_eval.evaluator")
tasks = pytest.importorskip("lm_eval.tasks")

CONTEXTS = ["Once upon a", "The cat sat on", "There was a little", "Once there was", "The mat"]
CHOICES = [" time", " the mat", " cat é", " little time there"]
TASK = """
task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models") / "scored"
    shape = {"vocab_size": 320, "max_position_embeddings": 128, "eos_token_id": 0, "bos_token_id": 0}
    write_full_precision(root, ml_dtypes.bfloat16, **shape)
    write_byte_level_tokenizer(root, 320)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (root / "tokenizer_config.json").write_text(json.dumps(names))
    return root


def scores(model: Path) -> list[list[float]]:
    """By context and choice, through transformers, in float32."""
    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model))
    found = []
    for context in CONTEXTS:
        found.append([])
        for choice in CHOICES:
            ids, begin = tokenizer(context + choice)["input_ids"], len(tokenizer(context)["input_ids"])
            logprobs = torch.log_softmax(llama(torch.tensor([ids])).logits[0].double(), -1)
            found[-1].append(sum(float(logprobs[i - 1, ids[i]]) for i in range(begin, len(ids))))
    return found


def test_loglikelihoods(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    expected = scores(model)
    gold = [int(np.argmax(row)) if place % 2 else 0 for place, row in enumerate(expected)]
    rows = [{"context": c, "choices": CHOICES, "gold": g} for c, g in zip(CONTEXTS, gold, strict=True)]
    (tmp_path / "cats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "cats.yaml").write_text(TASK.format(file=tmp_path / "cats.jsonl"))
    with running_server(str(model), "--engine", "reference") as server:
        result = evaluator.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "scored", "base_url": f"{server.url}/v1/completions", "tokenizer": str(model),
                "tokenizer_backend": "huggingface", "max_length": 128,
                "num_concurrent": 2, "add_bos_token": True,
            },
            tasks=["cats"],
            task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
            batch_size=1,
            bootstrap_iters=0,
        )  # fmt: skip
    accuracy = np.mean([int(np.argmax(row)) == g for row, g in zip(expected, gold, strict=True)])
    assert result["results"]["cats"]["acc,none"] == accuracy
    samples = sorted(result["samples"]["cats"], key=lambda sample: sample["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    np.testing.assert_allclose(found, expected, atol=2e-3)
