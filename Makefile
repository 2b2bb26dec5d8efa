# Everything below runs on a machine with python3 and git. Versions that are tested: constraints.txt.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
READY := $(VENV)/.ready
JOBS ?= 2
# Without bytecode every worker compiles every test anew, 5 s each, and every command of a test what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick lint bench accuracy detector trials signatures chaos conformance bless clean

## make demo: the main job on this machine, two nodes of two processes, ZeRO-3 on CPU
demo: $(READY)
	@rm -rf demo && mkdir demo
	@$(BIN)/dslaunch init --example slurm/cpu-demo > demo/job.yaml
	$(BIN)/dslaunch local demo/job.yaml --runs demo/runs
	@echo
	@echo "That was demo/job.yaml: 2 nodes x 2 processes, ZeRO-3 on CPU, the checkpoint in demo/checkpoints."
	@echo "Next:  $(BIN)/dslaunch plan slurm/llama-70b-8x8/job.yaml    what a real job would do, and why"
	@echo "       $(BIN)/dslaunch init > job.yaml                       a job file of your own"

## make test: linters, types, and every test; a real Slurm too where root can install one
test: $(READY) slurm chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist loadgroup --durations=20 --durations-min=5

## make quick: the inner loop, under a minute
quick: $(READY)
	$(BIN)/pytest -n $(JOBS) -m "not slow"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

## make bench: start-up and host lists, as ratios within one run
bench: $(READY)
	$(BIN)/python tests/bench.py

## make accuracy: predicted memory and step time against published runs, each source held out in turn
accuracy: $(READY)
	$(BIN)/python -m tests.accuracy

## make detector: slow nodes and links in 10^4 simulated worlds of each kind, beside what other tools do; 8 minutes
detector: $(READY)
	$(BIN)/python -m tests.detector

## make trials: the same over real links that tc makes slow, gloo in network namespaces; needs root, about 20 minutes
trials: $(READY)
	$(BIN)/python tests/trials.py

## make signatures: right causes on logs of other projects, each project held out in turn
signatures: $(READY)
	$(BIN)/python -m tests.signatures

## make chaos: faults on a real Slurm while DeepSpeed trains; what each costs in steps and seconds; needs root
chaos: $(READY) slurm
	$(BIN)/python tests/chaos.py

## make conformance: our rules beside two real DeepSpeeds, over a thousand configs on each; about 15 minutes
conformance: $(READY) libaio
	cd tests && ../$(BIN)/python -B -m conformance

## make bless: write the gallery's rendered files; read the diff afterwards
bless: $(READY)
	$(BIN)/pytest -q tests/test_gallery.py tests/test_fabrics.py --bless

# A venv of our own; pip's own resolver with what was tested as constraints.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "dslaunch needs Python 3.10 or newer")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || $(MAKE) --no-print-directory apt PACKAGES=python3-venv
	@$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null \
	  && command -v c++ >/dev/null || $(MAKE) --no-print-directory apt PACKAGES='g++ python3-dev'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/python -m compileall -q launcher
	touch $@

.PHONY: slurm chromium libaio apt
# Debian's Slurm for the tests; without root they are skipped and say so.
SLURM_PACKAGES := slurm-wlm munge iproute2 openssh-server environment-modules zstd squashfs-tools
slurm:
	@if command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null && \
	  test -x /usr/sbin/sshd && test -e /usr/share/modules/init/bash && command -v zstd >/dev/null && command -v mksquashfs >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  $(MAKE) --no-print-directory apt PACKAGES='$(SLURM_PACKAGES)'; \
	else echo "no Slurm here, its tests will be skipped: sudo apt-get install -y $(SLURM_PACKAGES)"; fi

# Debian's Chromium looks at the pages that dslaunch writes.
chromium:
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  $(MAKE) --no-print-directory apt PACKAGES=chromium; \
	else echo "no Chromium here, its tests will be skipped: sudo apt-get install -y chromium"; fi

# DeepSpeed builds its NVMe offload with these headers.
libaio:
	@if test -e /usr/include/libaio.h; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  $(MAKE) --no-print-directory apt PACKAGES=libaio-dev; \
	else echo "no libaio here, NVMe offload is skipped: sudo apt-get install -y libaio-dev"; fi

apt:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES); \
	else echo "missing: $(PACKAGES) (sudo apt-get install -y $(PACKAGES))" >&2; exit 1; fi

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
