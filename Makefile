PYTHON ?= python3
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# the environment's own tools first; one thread for each of two workers; no window for plots
RUN := PATH="$(BIN):$$PATH"
TEST := $(RUN) OMP_NUM_THREADS=1 MPLBACKEND=Agg
# checksums of everything that export, clean and readme may write
SUMS := find nbs histodiffusion README.md figures/readme -type f ! -name '*.pyc' ! -name '.*' ! -path '*/.ipynb_checkpoints/*' \
	-exec cksum {} + 2>/dev/null | sort -k 3

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-browser fuzz bench lab docs export readme check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make the environment in VENV (.venv) and install the project into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "HistoDiffusion needs Python 3.11 or newer: name one with 'make setup PYTHON=/path/to/python3'."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python tools/torchvision_hook.py install
	@touch $@

reproduce: setup  ## tables and figures of the profile quick, on tissue that comes with the code; PROFILE=, DATASET=, CORES=, ARGS=
	$(RUN) histodiffusion reproduce $(strip $(if $(PROFILE),--profile $(PROFILE)) \
		$(if $(DATASET),--dataset $(DATASET)) $(if $(CORES),--cores $(CORES)) $(ARGS))

test: setup  ## run the library's notebooks and the tutorials, then the tests; PYTEST_ARGS= is passed on
	@status=0; start=$$(date +%s); \
	for part in library tutorials; do $(TEST) nbdev-test nbs/$$part --n-workers 2 || status=1; done; \
	echo "nbdev-test: $$(test $$status = 0 && echo passed || echo FAILED, see above), $$(($$(date +%s) - start)) s"; \
	$(TEST) pytest -n 2 tests $(PYTEST_ARGS) || status=1; \
	exit $$status

test-browser: docs  ## open the site and JupyterLab in Chromium, if there is one
	$(TEST) pytest -m browser tests/test_browser.py $(PYTEST_ARGS)

fuzz: setup  ## ten minutes of damaged files for every reader; MINUTES= and ARGS= are passed on
	$(TEST) python tests/fuzz_readers.py --minutes $(or $(MINUTES),10) $(ARGS)

bench: setup  ## compare with the alternatives, each in one run; writes results/bench/*.json
	@mkdir -p results/logs; for nb in nbs/experiments/bench_*.ipynb; do \
		$(RUN) papermill --no-progress-bar --log-output $$nb results/logs/$$(basename $$nb) || exit 1; done

lab: setup  ## open the notebooks in JupyterLab
	$(RUN) jupyter lab nbs/start.ipynb

docs: setup  ## build the site in _site
	$(RUN) python docs/build.py

export: setup  ## write modules from notebooks, clean the notebooks, write README.md
	$(RUN) nbdev-export
	$(RUN) nbdev-clean
	@$(MAKE) --no-print-directory readme

readme: setup  ## write README.md from nbs/index.ipynb
	$(RUN) python docs/readme.py

check: setup  ## check that notebooks, modules and README.md agree, and run ruff
	@before=$$(mktemp); after=$$(mktemp); trap 'rm -f "$$before" "$$after"' EXIT; \
	$(SUMS) > "$$before"; \
	$(MAKE) --no-print-directory export || exit 1; \
	$(SUMS) > "$$after"; \
	if cmp -s "$$before" "$$after"; then echo "notebooks, modules and README.md agree"; else \
		echo "these files were not up to date, and were rewritten (run 'make export' before you commit):"; \
		sort "$$before" "$$after" | uniq -u | awk '{ print "  " $$3 }' | sort -u; exit 1; fi
	$(RUN) ruff check

clean:  ## remove build products and caches; the environment, data and results stay
	rm -rf build dist *.egg-info _proc _site .pytest_cache .ruff_cache .hypothesis
	find nbs histodiffusion tests docs \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} + \
		2>/dev/null || true
