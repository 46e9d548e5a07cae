# make run     install, fetch a model and serve it:  make run MODEL=qwen3-4b PORT=8080 HOST=0.0.0.0
# make test    install and run the tests
# make fuzz    ask the server for anything, and see that answers are what the document says:  make fuzz MINUTES=15
# make chaos   have things go wrong around a server under load, and look for what is lost:  make chaos ARGS="--minutes 60"
# make lint    check style and types
# make format  put the code into the project's style
# make images  install what pictures need; this compiles stable-diffusion.cpp
# make bench   measure speed, about forty minutes:  make bench ARGS=--quick
# make models  list the models there are
# make clean   remove the virtual environment and caches
#
# The first install compiles llama.cpp. Ready-made binaries instead:  make run WHEELS=cpu    (or metal, cu124, vulkan, ...)
# For an NVIDIA GPU:  make run CMAKE_ARGS=-DGGML_CUDA=on              Apple Silicon uses Metal by itself.

PYTHON ?= python3
BIN := .venv/bin

# Only what is given to make counts: shells and package managers export HOST and the like for purposes of their own.
given = $(if $(filter command line,$(origin $(1))),$($(1)))

export WHEELS

.PHONY: run models install images test fuzz chaos lint format bench clean

run: install
	@$(BIN)/llamaserve run $(if $(call given,MODEL),"$(MODEL)") $(addprefix --port ,$(call given,PORT)) \
		$(addprefix --host ,$(call given,HOST))

models: install
	@$(BIN)/llamaserve models

install:
	@$(PYTHON) scripts/install.py fast speech

images:
	@$(PYTHON) scripts/install.py fast speech images

.PHONY: install-dev
install-dev:
	@$(PYTHON) scripts/install.py fast speech images telemetry dev

test: install-dev
	$(BIN)/pytest

fuzz: install-dev
	FUZZ_MINUTES=$(or $(call given,MINUTES),15) $(BIN)/pytest tests/fuzz --timeout 0

chaos: install-dev
	$(BIN)/python scripts/chaos.py $(call given,ARGS)

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench:
	@$(PYTHON) scripts/install.py fast speech bench
	$(BIN)/python scripts/bench.py $(call given,ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
