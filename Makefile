# The interpreter that makes the environment; everything else runs inside it.
PYTHON ?= python3

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test chaos slow check

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## Serve the embedded model until Ctrl-C; ONCE=1 ends after one answer.
	@$(BIN)/python -m gllm_ray.demo $(if $(ONCE),--once)

test: $(INSTALLED) ## Run the tests, but for those of `make chaos` and `make slow`.
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

chaos: $(INSTALLED) ## Run the slow tests of faults, which `make test` leaves out.
	$(BIN)/python -m pytest -m chaos --session-timeout=2400

slow: $(INSTALLED) ## Run the other slow tests: scaling, upgrades, local clusters, batches.
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED) ## Lint, check the format, the types and the layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gllm_ray needs Python 3.11 or \
	later, and $(PYTHON) is %d.%d: name another, as in PYTHON=python3.11" % sys.version_info[:2])'
	@echo "installing gllm_ray and what it needs into .venv (some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
