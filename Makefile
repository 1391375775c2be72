# Every target makes its own set-up in .venv (Python 3.11 or newer; about 5 GB with torch).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# What is tested is tiny: two processes help, more threads only wait for each other. tests/conftest.py puts
# files with slow tests first; by number of tests those that compile would come last and alone. A process that dies
# is a failure, and the other one goes on: with a third in its place pytest-xdist has waited for ever.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0
CONFIG := fashion_ldm
BITS := w8a8 w4a8 w4a6
SHOWN = $(or $(filter w4a8,$(BITS)),$(lastword $(BITS)))
NUM ?= 300

.PHONY: setup demo test lint check fmt docs browser
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# Quantize a packaged model at three widths and show what came of it; also with CONFIG=emoji_ldm.
demo: $(READY)
	@set -e; for bits in $(BITS); do \
	    echo "== $(CONFIG) at $$bits"; \
	    $(BIN)/qncd run --config $(CONFIG) --bits $$bits --num $(NUM); \
	done
	@echo "== full precision and the widths"
	@$(BIN)/qncd compare $(addprefix runs/$(CONFIG)_,$(BITS))
	@echo "report:        runs/$(CONFIG)_$(SHOWN)/report.html"
	@echo "contact sheet: runs/$(CONFIG)_$(SHOWN)/samples/quantized_sheet.png"

# Everything that is tested; pages in Chromium, which is installed where apt may do that.
test: $(READY)
	@command -v chromedriver >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
	    || $(MAKE) --silent browser >/dev/null 2>&1 || echo "no Chromium: tests of pages are skipped"
	$(PYTEST)

# Format, lint, types.
lint: $(READY)
	$(BIN)/ruff format --check src tests scripts training examples
	$(BIN)/ruff check src tests scripts training examples
	$(BIN)/mypy

# Chromium, for the tests that look at pages (Debian, Ubuntu); without it they are skipped.
browser:
	DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install --yes --no-install-recommends chromium chromium-driver

# What a commit must pass: format, lint, types, import rules, fast tests.
check: lint
	$(PYTEST) -m "not slow"

fmt: $(READY)
	$(BIN)/ruff format src tests scripts training examples
	$(BIN)/ruff check --fix src tests scripts training examples

# What is written from the code: commands from their own help, numbers from the vocabulary, keys from the
# configuration, the picture of the rooms from the import table, results from the notebook's rows.
docs: $(READY)
	$(BIN)/python scripts/readme_help.py
	$(BIN)/python scripts/numbers_page.py
	$(BIN)/python scripts/config_reference.py
	$(BIN)/python scripts/architecture.py
	$(BIN)/python scripts/results_page.py
