# Everything runs in a virtual environment of its own; no other set-up is needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where Python may not keep what it compiles, each of the hundreds of processes that tests start compiles PyTorch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check docs clean

# The main job: build and prove the example bundles, then ask one of them a question in text and one about an image.
demo: $(READY)
	$(BIN)/arriero build build.yaml
	$(BIN)/arriero parity bundles/portable-int8
	$(BIN)/arriero run bundles/portable-int8 "What is 17 + 25?"
	$(BIN)/arriero run bundles/portable-int8 "Describe the image." --image models/example.png

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy finds a package by its folder's name, and this folder may have any
	types=$$(mktemp -d) && ln -s $(CURDIR) $$types/arriero && cd $$types && \
		$(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		$(foreach part,export graphs models profiles runtimes,-p arriero.$(part)) -m arriero.traits -m arriero.thresholds -m arriero.errors -m arriero.sizes

# The pages of docs/ as a site in build/docs; a link between them that leads nowhere fails.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.*"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) bundles build
