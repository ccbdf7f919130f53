# make demo    from a fresh clone to a trained, validated PoolFormer on built-in sample data
# make test    all tests
# make check   format, lint, types
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/poolformer_s12-demo
# One thread for each of the demo's two processes; torchrun sets the same, with a page of warning.
export OMP_NUM_THREADS ?= 1
# Where this is set, Python compiles torch anew at each start, which takes longer than many a test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test check clean

install: $(BIN)/.installed

$(BIN)/.installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: install
	$(BIN)/torchrun --standalone --nproc_per_node=2 train.py experiment=demo
	$(BIN)/python validate.py model=poolformer_s12 data=sample image_size=32 model.crop_pct=1.0 checkpoint=$(RUN)
	$(BIN)/python scripts/describe_run.py $(RUN)

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache
