# `make` alone prints this list. Every target that needs the environment makes it first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test proof certificates lint bench docs slurm-lab clean extras

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := deepspeed,demo,dev,encoders,media,megatron,moe,remote,tensorboard,torchao,wandb
# The environment is current if it was made from these very requirements.
STAMP := $(VENV)/.made-from-$(shell cat pyproject.toml constraints/ci.txt | sha256sum | cut -c 1-16)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints/ci.txt
SHELL_SCRIPTS := .ci/run constraints/refresh.sh $(wildcard slurm/*.sh slurm/lab/*.sh)

NODES := 3
# Two files of tests at a time; a file stays in one process, with the ranks that it has started.
PYTEST_PARALLEL := --numprocesses 2 --dist loadfile

# What `make demo` trains, and where the recipe reads and writes.
DEMO_CONFIG := configs/t2v_tiny.yaml
DEMO_DATA := demo/data
DEMO_RUN := runs/t2v_tiny
# One thread per process: two ranks share two cores.
export OMP_NUM_THREADS ?= 1

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything the demo and the tests need
	@:

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	rm -f $(VENV)/.made-from-*
	touch $@

demo: setup ## make shards from real media, train on 2 ranks, sample clips, write a report
	@echo "== shards: real clips and a theatre of moving pictures"
	@test -e $(DEMO_DATA)/manifest.json || $(BIN)/kinodit data demo $(DEMO_DATA)
	@echo "== training on 2 ranks: $(DEMO_CONFIG)"
	@$(BIN)/torchrun --nproc-per-node 2 -m kinodit train $(DEMO_CONFIG)
	@echo "== sampling"
	@$(BIN)/kinodit sample $(DEMO_RUN) \
		--prompt "a monkey moves left over a wooden table" \
		--prompt "a bell moves right over the moon" \
		--prompt "a kangaroo moves up over a temple garden" \
		--prompt "an ambulance moves down over a launch pad"
	@$(BIN)/torchrun --nproc-per-node 2 -m kinodit measure $(DEMO_RUN) --clips 64
	@echo "== report"
	@$(BIN)/kinodit report $(DEMO_RUN)

test: setup ## run the tests of the default set (no GPU, no Slurm; minutes)
	$(BIN)/pytest $(PYTEST_PARALLEL)

proof: setup certificates ## run the long proofs to their end and keep their figures (hours)
	$(BIN)/pytest -m slow
	$(BIN)/pytest -m slow --size full tests/data/test_fuzz.py
	$(BIN)/pytest -m learning --size full
	$(BIN)/pytest -m chaos --size full

certificates: setup ## certify recipes and kinds of models anew, and keep the figures
	rm -rf configs/certificates
	for recipe in $(wildcard configs/*.yaml); do \
		$(BIN)/kinodit certify $$recipe \
			--certificate configs/certificates/$$(basename $$recipe .yaml).json || exit 1; \
	done
	$(BIN)/pytest -m mutants --size full tests/certificates tests/mutants

lint: setup ## ruff, mypy --strict, import contracts, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

bench: setup ## time our model against its peers (12 minutes, 1 thread)
	$(BIN)/python benchmarks/step.py

gpu-accept: setup ## accept a node: certificate, device tests, presets against plans (30 minutes)
	$(BIN)/python benchmarks/gpu_accept.py --json build/gpu-accept.json

docs: setup ## check the documentation: links, and the commands it shows
	$(BIN)/pytest tests/repo/test_docs.py

slurm-lab: ## a shell in a real, throw-away Slurm cluster of NODES=3 nodes (Debian's slurm-wlm, munge)
	@slurm/lab/lab.sh --nodes $(NODES)

clean: ## remove what was built or measured here; keeps .venv, runs/ and demo/
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

extras:
	@echo $(EXTRAS)
