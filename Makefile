# One command for each task. A `.venv` with exact versions is made on first use, from Python 3.11 or 3.12 with pip.
PYTHON ?= python3
MODEL ?=
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c .ci/constraints.txt

.PHONY: serve test test-slow check load chat clean

serve: $(VENV)/.serve  ## serve a model on 127.0.0.1:$(PORT); MODEL=/path for a real checkpoint
	@exec $(BIN)/python -m cluster.serve --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(VENV)/.dev  ## the whole test suite, on the CPU
	$(BIN)/python -m pytest -m 'not ray and not slow' -n auto --maxprocesses 4 --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -m 'ray and not slow' $(ARGS) || [ $$? = 5 ]  # 5: ARGS leaves none of them

test-slow: $(VENV)/.dev  ## three more services, on several Ray nodes and under kills: 5 minutes on free cores, and not beside anything else
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.dev  ## formatting, lint, types, import contracts, file sizes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! git ls-files '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 500 {print "over 500 lines:", $$0}' | grep .

load: $(VENV)/.serve  ## measure a running server: make load ARGS="--concurrency 16 --duration 30"
	@$(BIN)/python -m cluster.loadtest --url http://127.0.0.1:$(PORT) $(ARGS)

chat: $(VENV)/.serve  ## talk to a running server
	@$(BIN)/python -m cluster.chat --url http://127.0.0.1:$(PORT) $(ARGS)

clean:  ## remove the environment and everything the service wrote
	rm -rf $(VENV) var

$(VENV)/.made:
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.made requirements.txt .ci/constraints.txt
	@echo "Installing what Lightship runs on (about 1.5 GB on first use) ..."
	@$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.serve requirements-dev.txt
	@echo "Installing what the tests need ..."
	@$(INSTALL) -r requirements-dev.txt
	@touch $@
