"""A tuned model on disk: a 16-bit Hugging Face Llama, and the scales that it is to be rounded by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from quant.directories import copy_companions
from quant.format import WEIGHTS_FILE, CheckpointReader, write_json
from quant.trainable import TrainableQuantizedLinear, stored_type
from quant.tuned_scales import write_scales


def write_tuned(reader: CheckpointReader, out: Path, model: LlamaForCausalLM, report: dict[str, Any]) -> None:
    """Writes a tuned model (`quant.trainable`) into the directory `out`, as a 16-bit checkpoint like `reader`.

    Every tensor has the type of the source's norms; the learned scales lie beside it, and `report` is in osp.json.
    """
    config = reader.config
    tensors = {name: torch.from_numpy(reader.norm(name).astype(np.float32)) for name in config.norm_names()}
    scales: dict[str, NDArray[np.float32]] = {}
    for name in (*config.linear_shapes(), *config.table_shapes()):
        module: Any = model.get_submodule(name)
        tensors[f"{name}.weight"] = module.weight.detach()
        if isinstance(module, TrainableQuantizedLinear):
            scales[f"{name}.weight_scale"] = module.weight_scale().detach().flatten().numpy()
            if module.input_scale is not None:
                scales[f"{name}.input_scale"] = module.input_scale().detach().flatten().numpy()
    dtype = stored_type(reader)
    copy_companions(reader.path, out)
    shutil.copyfile(reader.path / "config.json", out / "config.json")
    stored = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, out / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copymode(out / "config.json", out / WEIGHTS_FILE)  # safetensors lets only the owner read its files
    write_scales(out, scales)
    write_json(out / "osp.json", {**reader.provenance, "tuning": report})
