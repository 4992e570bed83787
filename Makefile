# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

BIN := .venv/bin
STAMP := .venv/.installed
BENCHMARK ?= benchmarks.performance
# Test processes: one for each core.
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo   compile a fine-tuned ViLT to a reduced ONNX model, run it and prove it"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  measure full-size ViLT-B/32 and METER beside their peers (about an hour)"
	@echo "make clean  remove .venv and everything generated"

demo: $(STAMP)
	@$(BIN)/python -m examples.easy_vqa.demo

test: $(STAMP)
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

bench: $(STAMP)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[plots]"
	@$(BIN)/python -m $(BENCHMARK)

# The stamp is written last, so an interrupted set-up is done again. torch is named beside the package, so that pip
# decides on the pinned one at once and never looks at a newer build with its gigabytes of CUDA packages. Constraints
# in the environment, unlike those of -c, bind the build of the package too.
$(STAMP): pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHON) python3.11 python3; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 1; fi; \
	echo "==> setting up .venv with $$($$python --version): a few minutes, once" && \
	$$python -m venv --clear .venv
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check \
	    "$$(grep '^torch==' constraints.txt)" -e ".[cpu,rtx,openvino,dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
