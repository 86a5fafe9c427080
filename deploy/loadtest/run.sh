#!/bin/sh
# Load test of a running deployment, with settings from the environment: TARGET_A (required), TARGET_B, OUT,
# REQUEST_RATE, NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN. The key is OPENAI_API_KEY.
set -eu
exec osp bench load "${TARGET_A:?a URL or a checkpoint}" ${TARGET_B:+"$TARGET_B"} \
    --out "${OUT:-results}" \
    --request-rate "${REQUEST_RATE:-inf}" \
    --num-prompts "${NUM_PROMPTS:-64}" \
    --random-input-len "${INPUT_LEN:-128}" \
    --random-output-len "${OUTPUT_LEN:-64}"
