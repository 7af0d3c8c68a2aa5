# `make demo` and `make test` do everything, in one environment, with Python 3.10 or newer.
PYTHON ?= python3
VENV_TEST ?= .venv-test
REPORT := demo-report

.PHONY: test demo bench docs site gpu baselines clean

test: $(VENV_TEST)/ready
	$(VENV_TEST)/bin/ruff check .
	$(VENV_TEST)/bin/ruff format --check .
	$(VENV_TEST)/bin/mypy
	$(VENV_TEST)/bin/pytest -n 2 --dist worksteal --mpl

demo: $(VENV_TEST)/ready
	rm -rf $(REPORT)
	cd examples && $(abspath $(VENV_TEST))/bin/pytest \
		--mpl --mpl-generate-summary=basic-html --mpl-results-path=../$(REPORT)
	@echo "The pictures, each beside its baseline: $(CURDIR)/$(REPORT)/fig_comparison_basic.html"

# Figures that the README and the docs quote, as ratios of things measured in one run.
bench: $(VENV_TEST)/ready
	for file in benchmarks/bench_*.py; do $(VENV_TEST)/bin/python $$file || exit 1; done

# What only a GPU can show, in eight minutes at most, written to docs/gpu.md. PYTHON has torch.
gpu:
	$(PYTHON) benchmarks/gpu.py

# Write what the docs list and show: tables from the registries, and what the examples print.
docs: $(VENV_TEST)/ready
	$(VENV_TEST)/bin/python -W ignore docs/generate.py

# The docs as a site that needs no network: build/site/index.html.
site: $(VENV_TEST)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV_TEST)/bin/mkdocs build --quiet --strict

# Write the baselines that changed, to be looked at before they are committed.
baselines: $(VENV_TEST)/ready
	$(VENV_TEST)/bin/pytest -q tests/test_pictures.py --attn-update=all
	cd examples && $(abspath $(VENV_TEST))/bin/pytest -q --attn-update=all

$(VENV_TEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_TEST)
	$(VENV_TEST)/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV_TEST) .venv-gpu $(REPORT) build dist *.egg-info
