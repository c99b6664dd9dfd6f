# `make` sets everything up and runs the main job on the embedded data; `make test` sets up and runs the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# A package index that carries a CPU build of torch, where the default one does not.
TORCH_INDEX ?=
PIP_FLAGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Tests run on so many processes, a file at a time; some start the parties of a secure channel beside them.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile

.PHONY: run setup test test-all lint types docs proto clean

run: $(STAMP)
	$(BIN)/privkd train --epsilon 3

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	# CrypTen's metadata asks for a package that no longer exists, so its dependencies are ours.
	$(BIN)/privkd doctor --fix
	touch $@

test: $(STAMP)
	$(PYTEST) -m 'not slow'

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

# The documentation as a site, in site/. The tutorials run while it is built, so that it shows what they print.
docs: $(STAMP)
	RUN_TUTORIALS=true $(BIN)/mkdocs build --strict

# The parties' protocol as Python: what is committed is what this makes.
proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		privkd/secure/aggregator.proto

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache site
