# make demo       the main job on its embedded default, on CPUs; make demo ARGS="--seed 2 --name seed-2" hands flags on, and
#                 ARGS="--device cuda --workers 1" takes a GPU
# make test       the tests;  make test-all  also the slow ones
# make lint       ruff and mypy
# make env        only the environment, .venv, which the targets above make or bring up to date by themselves
# make clean      removes the environment and the caches, never results
#
# DEVICE=cpu|cuda       the builds to install (default: those of the .venv that stands, else cuda where nvidia-smi lists a GPU)
# PYTHON=python3.11     the interpreter to make the environment with
# TORCH_INDEX=URL       where torch comes from (default: what pip is configured with; for a CPU set-up where that has no CPU
#                       wheel, https://download.pytorch.org/whl/cpu). Example: https://download.pytorch.org/whl/cu130

export DEVICE PYTHON TORCH_INDEX
python := .venv/bin/python

.PHONY: demo test test-all lint env clean

demo: env
	$(python) jobs/train.py $(ARGS) $(if $(findstring --device,$(ARGS)),,--device cpu)

test: env
	$(python) -m pytest -m "not slow" $(ARGS)

test-all: env
	$(python) -m pytest $(ARGS)

lint: env
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

env:
	@packaging/environment.sh

clean:
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info
	rm -rf packaging/fbgemm-gpu-cpu-shim/build packaging/fbgemm-gpu-cpu-shim/*.egg-info
	find jobs sellarec tests -name __pycache__ -type d -prune -exec rm -rf {} +
