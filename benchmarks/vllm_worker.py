"""vLLM as a worker of `benchmarks.vllm_decode`: a whole model, from a checkpoint of random weights.

vLLM's engine and its worker run in this process, so that a signal stops both of them. A step is timed from outside:
it holds the scheduler and the sampler too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.worker import arguments, serve

MOST_SEQUENCES = 16

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmBench:
    """A `benchmarks.worker.Bench` around vLLM's `LLM`. All prompts are computed anew."""

    def __init__(self, checkpoint: Path, dtype: str, context: int, *, eager: bool) -> None:
        from vllm import LLM

        self._llm: Any = LLM(
            str(checkpoint),
            dtype=dtype,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=MOST_SEQUENCES,
            max_num_batched_tokens=MOST_SEQUENCES * 128,
            enable_prefix_caching=False,
        )
        self._count = 0

    def decode(self, batch: int, context: int, tokens: int) -> float:
        """As `Bench`; the step that reads the prompts does not count."""
        self._add(batch, max(1, context), tokens + 1)
        while self._generated < batch:
            self._step()
        began, before = time.perf_counter(), self._generated
        while self._llm.llm_engine.has_unfinished_requests():
            self._step()
        return (self._generated - before) / (time.perf_counter() - began)

    def prefill(self, tokens: int) -> float:
        """As `Bench`."""
        self._add(1, tokens, 1)
        began = time.perf_counter()
        while self._llm.llm_engine.has_unfinished_requests():
            self._step()
        return tokens / (time.perf_counter() - began)

    def close(self) -> None:
        """Nothing to do: all of it ends with the process."""

    def _add(self, batch: int, prompt_tokens: int, tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._generated = 0
        params = SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for sequence in range(batch):
            self._count += 1
            prompt = [1 + (7 * position + sequence) % 251 for position in range(prompt_tokens)]
            self._llm.llm_engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)

    def _step(self) -> None:
        for output in self._llm.llm_engine.step():
            self._generated += len(output.outputs[0].token_ids)


def main() -> None:
    """Serves measurements of vLLM."""
    parser = arguments("vLLM, a whole model")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512, help="most tokens of a sequence")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(options.threads))
    import vllm  # it reads its environment now

    about = {"engine": "vLLM", "version": vllm.__version__, "checkpoint": options.checkpoint.name}
    serve(lambda: VllmBench(options.checkpoint, options.dtype, options.context, eager=options.eager), about)


if __name__ == "__main__":
    main()
