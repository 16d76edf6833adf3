# make demo   install what is needed and run the main job on a real 135M model
# make test   the same installation, then the tests
# make lint | format | bench | clean
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check
LISTED = $(VENV)/bin/python -c 'import sys; [print(l.split(":", 1)[1].strip()) for l in open("requirements-ci.txt") if l.startswith("\# " + sys.argv[1] + ":")]'
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp)
CXX_FILES = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp)

.PHONY: demo test lint format bench install clean

demo: install
	$(VENV)/bin/svdk demo

test: install
	$(VENV)/bin/python -m pytest

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: install
	$(VENV)/bin/svdk bench

install: $(VENV)/.built

$(VENV)/.dependencies: requirements-ci.txt
	@$(PYTHON) setup.py preflight
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "svdk: no venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing the packages of requirements-ci.txt (a few minutes the first time) ..."
	@$(PIP) -r requirements-ci.txt
	@$(PIP) --no-deps $$($(LISTED) no-deps)
	@$(VENV)/bin/python -c "import triton" 2>/dev/null || $(PIP) $$($(LISTED) if-absent) || \
	  echo "svdk: no Triton for this platform; its tests will be skipped" >&2
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@$(PYTHON) setup.py preflight
	@echo "Building svdk ..."
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info svdk/*.so $(VENV)
