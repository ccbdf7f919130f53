# make demo    from a fresh clone to a trained, validated PoolFormer on built-in sample data
# make test    the tests without whole runs, faults, benchmarks and SLURM, in minutes
# make test-all     all tests: whole runs, faults, benchmarks and SLURM too; make test-slurm: those on SLURM only. Both
#              install Debian's packages for SLURM, as root
# make gpu-model   predict a training step on GPUs without one; make gpu-budgets writes the budgets that tests compare
# make docs    the documentation as a site, in build/site
# make check   format, lint, types
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/poolformer_s12-demo
TEST_PROCESSES ?= 2
WAITING := tests/tracking/test_wandb_service.py
# One thread for each of the demo's two processes; torchrun sets the same, with a page of warning.
export OMP_NUM_THREADS ?= 1
# With more threads, each process that compiles a network starts another, which imports torch too.
export TORCHINDUCTOR_COMPILE_THREADS ?= 1
# If this is set, Python compiles torch again at each start, which takes longer than many tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-all test-here test-waiting test-slurm gpu-model gpu-budgets docs check clean

install: $(BIN)/.installed

$(BIN)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11, or \
	missing; give another, as in make demo PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: install
	$(BIN)/torchrun --standalone --nproc_per_node=2 train.py experiment=demo
	$(BIN)/python validate.py model=poolformer_s12 data=sample checkpoint=$(RUN)
	$(BIN)/python scripts/describe_run.py $(RUN)

test: install
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not whole and not slow" $(SELECT)

# The jobs on SLURM and the tests in WAITING mostly wait, so they run in parallel with the other tests.
test-all: install
	$(MAKE) --jobs=2 --output-sync=target test-waiting test-here

test-here: test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "whole and not slow" \
	$(addprefix --ignore=,tests/slurm $(WAITING))

test-waiting: test-slurm
	$(BIN)/python -m pytest -m "whole and not slow" $(WAITING)

test-slurm: install
	tests/slurm/install.sh
	METAFORMER_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm

gpu-model: install
	$(BIN)/python -m benchmarks.gpu

gpu-budgets: install
	$(BIN)/python -m benchmarks.gpu --update

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --shell=bash slurm/*.sh slurm/*.sbatch slurm/site.example.env .ci/run tests/slurm/*.sh scripts/*.sh
	$(BIN)/hadolint Dockerfile

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache
