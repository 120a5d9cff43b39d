# Two commands for users, each with its whole set-up: make compare, make test.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# The strict editable install links source files one by one, so it is redone when a
# file appears or the dependencies change; editing a file needs nothing.
SOURCES := $(sort $(wildcard optimizers/*.py landscape/*.py testing/*.py benchmarks/*.py))
FINGERPRINT := $(shell (echo $(SOURCES); cat pyproject.toml constraints.txt) | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/installed-$(FINGERPRINT)

.PHONY: compare test slow lint docs format claims speed clean

compare: $(INSTALLED)  ## Compare optimizers on embedded data; ARGS='--task bytes' etc.
	$(BIN)/python -m basinax.benchmarks compare $(ARGS)

test: $(INSTALLED)  ## Run the default test suite with doctests.
	$(BIN)/python -m pytest -n auto --doctest-modules --pyargs \
	    basinax.optimizers basinax.landscape basinax.testing tests $(ARGS)

slow: $(INSTALLED)  ## Run the tests that take minutes.
	$(BIN)/python -m pytest -m slow tests $(ARGS)

lint: $(INSTALLED)  ## Check format, style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(INSTALLED)  ## Build the documentation into site/, to be read without a server.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Documentation: site/index.html"

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

claims: $(INSTALLED)  ## Reproduce or refute the papers' headline phenomena.
	$(BIN)/python -m basinax.benchmarks claims $(ARGS)

speed: $(INSTALLED)  ## Time the kernels against the authors' iteration.
	$(BIN)/python -m basinax.benchmarks speed $(ARGS)

$(INSTALLED):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable '.[test,lint,docs]' \
	    --config-settings editable_mode=strict
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
