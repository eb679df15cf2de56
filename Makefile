# make quickstart   set-up from nothing, then the whole pipeline on a small synthetic cohort: runs/quickstart/
# make test         set-up from nothing, then the tests
# make test-fast    those that start no process: the inner loop
# make test-processes  those that kill, starve and move whole runs: lost launchers, full disks, other numbers of processes
# make test-slurm   those on a real SLURM of two nodes, which needs its packages
# make test-slow    those that take minutes: every ZeRO stage and number of processes, twenty kills, 10 000 damaged inputs
# make test-oldest  the tests with the oldest dependencies that pyproject.toml admits; make test-newest: with the newest
# make test-brainmarks  the model of Brainmarks in the suite itself, in an environment of its own
# make test-pages   the pages of the quickstart in a browser
# make slurm        as root: the SLURM packages of Debian
# make chromium     as root, unless it is there: the browser in which the pages are tested; without it those tests are skipped
# make experiments  does pretraining learn? many hours of two cores: runs/experiments/tables.md
# make lint         ruff, mypy and shellcheck
# make docs         the documentation: docs/_build/html/index.html; warnings are errors

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
OUT := runs/quickstart
SHARDS := $(OUT)/shards

.PHONY: quickstart test test-fast test-processes test-slurm test-pages test-slow test-oldest test-newest test-brainmarks slurm chromium lint docs experiments clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	# the reference encoder of the tests; its own dependencies (timm, torchvision) are not needed
	$(BIN)/python -m pip install --quiet --no-deps hiera-transformer==0.1.4
	touch $@

quickstart: $(READY)
	test -f $(OUT)/cohort/cohort.yaml || $(BIN)/python tools/make_cohort.py --out $(OUT)/cohort
	$(BIN)/python tools/make_shards.py $(OUT)/cohort/cohort.yaml --out $(SHARDS) \
		grid.mm=8 'grid.shape=[24,24,24]' extractor.steps=350
	$(BIN)/python tools/pretrain.py configs/quickstart.yaml data=$(SHARDS) run.out=$(OUT)/pretrain
	$(BIN)/python tools/probe.py $(OUT)/pretrain --data $(SHARDS) --random-seeds 1 --task configs/downstream/synthetic_group.yaml \
		--task configs/downstream/synthetic_score.yaml --task configs/downstream/synthetic_fingerprint.yaml
	$(BIN)/python tools/report.py $(OUT)/pretrain
	@echo "look at $(SHARDS)/report/index.html and $(OUT)/pretrain/report/index.html"

test: $(READY)
	$(PYTEST) -m 'not slow and not processes' --ignore=tests/slurm

test-processes: $(READY)
	$(PYTEST) -m 'processes and not slow' --ignore=tests/slurm

# only the files with such tests are imported
test-fast: $(READY)
	$(PYTEST) -q -m 'fast and not slow' $$(grep -rl --include='test_*.py' 'pytest.mark.fast' tests)

test-slurm: $(READY)
	$(PYTEST) -m 'not slow' tests/slurm

test-pages: $(READY)
	test -f $(SHARDS)/report/index.html -a -f $(OUT)/pretrain/report/index.html || { echo "make quickstart first"; exit 1; }
	SLIM_QUICKSTART=$(abspath $(OUT)) $(PYTEST) tests/test_quickstart_pages.py

test-slow: $(READY)
	$(PYTEST) -m slow

# torch stays: another build of it is several gigabytes, and DeepSpeed is bound to versions of torch
test-oldest test-newest:
	$(PYTHON) -m venv $(VENV)-$@
	$(VENV)-$@/bin/python -m pip install --quiet --upgrade $(if $(filter test-oldest,$@),-c tests/oldest.txt,torch==2.13.0) -e '.[test]'
	$(VENV)-$@/bin/python -m pip install --quiet --no-deps hiera-transformer==0.1.4
	OMP_NUM_THREADS=1 $(VENV)-$@/bin/python -m pytest -n 2 --dist loadfile -m 'not slow' --ignore=tests/slurm $(TESTS)

# The suite requires setuptools<67 and torch 2.13 requires setuptools>=77: it is installed after the packages that it imports
# and without those that it names.
test-brainmarks:
	$(PYTHON) -m venv $(VENV)-brainmarks
	$(VENV)-brainmarks/bin/python -m pip install --quiet -c constraints.txt -e '.[train]' pytest hypothesis \
		'cloudpathlib[s3]' datasets omegaconf peft pycortex tabulate templateflow
	$(VENV)-brainmarks/bin/python -m pip install --quiet --no-deps brainmarks==0.1.1
	OMP_NUM_THREADS=1 $(VENV)-brainmarks/bin/python -m pytest tests/slim/brainmarks

slurm:
	sh tests/slurm/install.sh

chromium:
	sh tests/install_chromium.sh

experiments: $(READY)
	$(BIN)/python tools/experiments.py --out runs/experiments

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launchers/cluster/templates/*.sh tests/slurm/install.sh tests/install_chromium.sh

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(VENV)-test-* $(VENV)-brainmarks runs build dist docs/_build *.egg-info
