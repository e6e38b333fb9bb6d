# The two commands of a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# How many processes run tests; each takes a core and up to 3 GiB.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: install demo test quick lint clean
install: $(VENV)/.installed

demo: install
	$(BIN)/graphcomp compile models:resnet20-digits --recipe models/demo.yaml --overwrite -o out/demo

test: install
	$(PYTEST)

# What one runs while working.
quick: install
	$(PYTEST) -m "not slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) out build *.egg-info
