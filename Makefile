# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

BIN := .venv/bin
STAMP := .venv/.installed
# A second environment, of the newest versions that pip finds; torch alone is the pinned one.
NEWEST := .venv-newest/bin
NEWEST_STAMP := .venv-newest/.installed
NEWEST_TESTS := tests/capture/test_capture.py tests/capture/test_loading.py tests/test_generation.py tests/test_oracle_llava.py
# Folders with tests that have the marker `fast`.
FAST_TESTS := tests/reducers tests/test_guards.py tests/capture/test_asked.py tests/frontends/test_uneven_segments.py tests/analysis/test_axes.py tests/analysis/test_rules.py tests/methods tests/parity \
    tests/rewrite tests/test_plan.py tests/test_files.py tests/test_layers.py tests/test_distill.py
BENCHMARK ?= benchmarks.performance
# Test processes: one for each core.
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-newest lint docs dist bench clean

help:
	@echo "make demo   compile a fine-tuned ViLT to a reduced ONNX model, run it and prove it"
	@echo "make test   run the tests"
	@echo "make test-fast  those that neither capture nor export a model (a minute)"
	@echo "make test-newest  a few of them on the newest versions that pip finds"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documentation in build/site: warnings are errors, links are checked"
	@echo "make dist   build wheel and source archive in dist, and check them"
	@echo "make bench  measure full-size ViLT-B/32 and METER beside their peers (about an hour)"
	@echo "make clean  remove .venv and everything generated"

demo: $(STAMP)
	@$(BIN)/python -m examples.easy_vqa.demo

test: $(STAMP)
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=25 $(PYTEST_ARGS)

test-fast: $(STAMP)
	@echo "==> pytest, fast tests"
	@$(BIN)/python -m pytest -n $(JOBS) -m fast $(PYTEST_ARGS) $(FAST_TESTS)

test-newest: $(NEWEST_STAMP)
	@echo "==> pytest on what pip finds today"
	@$(NEWEST)/python -m pip list --format=freeze 2>/dev/null | grep -E '^(torch|transformers|onnx|onnxscript|onnxruntime)=='
	@$(NEWEST)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS) $(NEWEST_TESTS)

lint: $(STAMP)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

docs: $(STAMP)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[docs]"
	@echo "==> mkdocs build"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

dist: $(STAMP)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[release]"
	@rm -rf dist
	@echo "==> build"
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist . > /dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

bench: $(STAMP)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[plots]"
	@$(BIN)/python -m $(BENCHMARK)

# The stamp is written last, so an interrupted set-up is done again. torch is named beside the package, so that pip
# decides on the pinned one at once and never looks at a newer build with its gigabytes of CUDA packages. Constraints
# in the environment, unlike those of -c, bind the build of the package too.
define venv
	@python=; for candidate in $(PYTHON) python3.11 python3; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 1; fi; \
	echo "==> setting up $(1) with $$($$python --version): a few minutes, once" && \
	$$python -m venv --clear $(1)
endef

$(STAMP): pyproject.toml constraints.txt
	$(call venv,.venv)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check \
	    "$$(grep '^torch==' constraints.txt)" -e ".[cpu,rtx,openvino,dev]"
	@touch $@

$(NEWEST_STAMP): pyproject.toml constraints.txt
	$(call venv,.venv-newest)
	@$(NEWEST)/python -m pip install -qq --disable-pip-version-check \
	    "$$(grep '^torch==' constraints.txt)" -e ".[cpu,dev]"
	@touch $@

clean:
	rm -rf .venv .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
