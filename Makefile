# `make demo` and `make test` set up what they need; both work on a machine with Python 3.11+, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo

.PHONY: demo test lint types unit docs setup system clean

demo: setup
	$(BIN)/fmsuite example-data --domain pathology --out $(DEMO)/slides
	$(BIN)/fmsuite tile --domain pathology $(DEMO)/slides --recipe pathology-simclr --out $(DEMO)/index.parquet --preview
	$(BIN)/fmsuite pretrain --domain pathology --data $(DEMO)/index.parquet --out $(DEMO)/simclr
	$(BIN)/fmsuite embed --encoder $(DEMO)/simclr --index $(DEMO)/index.parquet --out $(DEMO)/features/pretrained.zarr
	$(BIN)/fmsuite embed --encoder untrained:$(DEMO)/simclr --index $(DEMO)/index.parquet --out $(DEMO)/features/untrained.zarr
	$(BIN)/fmsuite embed --encoder histogram --index $(DEMO)/index.parquet --out $(DEMO)/features/histogram.zarr
	$(BIN)/fmsuite fewshot --features $(DEMO)/features/pretrained.zarr --features $(DEMO)/features/untrained.zarr \
		--features $(DEMO)/features/histogram.zarr --out $(DEMO)/fewshot --no-report
	$(BIN)/fmsuite report $(DEMO)/fewshot $(DEMO)/simclr --out $(DEMO)/report.html

test: setup lint types unit docs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --durations 15

docs: setup
	$(BIN)/mkdocs build --strict --quiet

setup: system $(VENV)/.installed

system:
	@PYTHON="$(PYTHON)" sh tools/system_packages.sh

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) site
