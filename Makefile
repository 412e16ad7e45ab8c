# make demo: the main job on four CPU processes. make test: what CI runs. make check: before each commit.
# make docs: the pages of docs/ as a site, in build/site.
# make bench: the named workloads beside their peers, within 15 minutes.
# make native: the optional C++ path, into the user's cache.
PYTHON ?= python3.11
PIP_FLAGS ?= --disable-pip-version-check --quiet
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin

.PHONY: demo native test chaos check format bench docs clean
.DEFAULT_GOAL := check

# What the demo needs; `ready` adds the tools and the hosts of the integrations.
$(VENV)/demo: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; install it, or name another from 3.11 on: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null || { echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install $(notdir $(PYTHON))-venv"; exit 1; }
	@echo "installing into $(VENV) (once: a minute or more; torch is a large download; make PIP_FLAGS= shows what pip does)"
	@$(VENV)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[plot]'
	@touch $@

# DS_BUILD_OPS=0: DeepSpeed compiles nothing while it is installed.
$(VENV)/ready: $(VENV)/demo
	@echo "installing what the tests need (once: minutes)"
	@DS_BUILD_OPS=0 $(VENV)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/demo
	@$(RUN)/torchrun --standalone --nproc-per-node 4 scripts/demo.py

native: $(VENV)/ready
	@$(RUN)/python -m moe.build

test: $(VENV)/ready
	@if { command -v c++ || command -v g++ || command -v clang++; } >/dev/null; then $(RUN)/python -m moe.build; else echo "no C++ compiler: the tests of the compiled path are skipped"; fi
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet
	@$(RUN)/python -m pytest -n 2

docs: $(VENV)/ready
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet
	@echo "written: build/site/index.html"

chaos: $(VENV)/ready
	@$(RUN)/python -m pytest tests/moe/live -m "chaos or not chaos"

check: $(VENV)/ready
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/python -m pytest -n 2 -m fast

format: $(VENV)/ready
	@$(RUN)/ruff format .
	@$(RUN)/ruff check --fix .

bench: $(VENV)/ready
	@if { command -v c++ || command -v g++ || command -v clang++; } >/dev/null; then $(RUN)/python -m moe.build; else echo "no C++ compiler: the compiled path is not measured"; fi
	@$(RUN)/python -m scripts.bench.suite

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
