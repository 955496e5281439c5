# The environment, the run, the checks. `make repro` and `make test` are all a newcomer needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Tests in as many processes as there are cores, whole files each, so that they share what they run,
# in the order of tests/conftest.py.
LANES := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Stages are started as `python`: the environment's own.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: repro advise experiments test test-long verify torture bench lint install

repro: install  ## run what isn't up to date, from the images to the final model
	@$(RUN) python -m pipeline params --check
	@$(RUN) dvc repro

advise: install  ## what fine-tuning may bring and cost, before stage 1
	@$(RUN) dvc repro advise
	@cat models/advice/advice.txt

# Of what differs, what a person chooses by: validation accuracies, and params.
DETAIL := models/|data/|pipeline/|seconds|per_second|low$$|high$$|loss$$|test|minus_probe
DETAIL := $(DETAIL)|best_epoch|factor|stage..val|probe.val|cv_|fine_tuning|advice|Created

experiments: install  ## a line an experiment: validation accuracies that differ, and the params
	@$(RUN) dvc exp show --md --only-changed --hide-workspace --drop '.*($(DETAIL)).*'

test: lint  ## lint, types and all tests that don't take minutes
	@$(RUN) pytest -m "not long and not families" $(LANES)

test-long: .venv/.dev  ## the tests that take minutes: an hour and a half on two cores, alone
	@$(RUN) pytest -m long $(LANES)
	@$(RUN) pytest -m families $(subst loadfile,load,$(LANES))
	@$(RUN) pytest --fuzz 20 tests/test_fuzz.py

verify: install  ## two clean clones run the graph: the same hashes?
	@$(RUN) python tests/verify.py --threads 1

torture: install  ## a hundred kills of a run on real images (an hour or more, alone)
	@$(RUN) python tests/torture.py

bench: .venv/.peers  ## our speed beside the bare network's and the peers' (three quarters of an hour, alone)
	@$(RUN) dvc repro --quiet probe
	@$(RUN) python -m bench.startup
	@$(RUN) python -m bench.memory
	@$(RUN) python -m bench.equal
	@$(RUN) python -m bench.ratios --json bench/ratios.json
	@$(RUN) python -m bench.whole --json bench/whole.json

lint: .venv/.dev
	@$(RUN) ruff format --check --quiet .
	@$(RUN) ruff check --quiet .
	@$(RUN) mypy --no-error-summary

install: .venv/.installed  ## the environment, once

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 14) or sys.exit("error: Python 3.11 to 3.14 is needed, this is %d.%d; set PYTHON=python3.11" % v)'
	@echo "installing into .venv (some minutes the first time)"
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv  # or a half-made one
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable .
	@.venv/bin/python -m pipeline plots .venv/plots.html
	@.venv/bin/dvc config --local plots.html_template ../.venv/plots.html
	@touch $@

.venv/.dev: .venv/.installed
	@echo "installing what tests need into .venv"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv/.peers: .venv/.installed
	@echo "installing the peers into .venv"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[peers]"
	@touch $@
