# make demo       environment, three small models with two seeds each, their comparison (minutes on 2 cores)
# make test       every test that needs no heavy extra
# make test-fast  the inner loop
# make test-hosts several processes under jax.distributed; alone, for they wait for one another with limits
# make test-interop  beside torch, transformers and lm-eval, and with a real model, which it downloads
# make test-engines launch engines as they are: a SLURM cluster, gcloud, xpk, SkyPilot; alone, root, minutes
# make test-pods  programs compiled for TPUs, with libtpu, which is fetched for them alone
# make test-gpu   programs compiled for GPUs, with jax's CUDA plugin, which is fetched for them alone (1.6 GB)
# make lint       formatting, lint, types
# make site       the documentation as a website, in build/site
# make golden     rewrite tests/golden from the experiments; review the diff
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-test
LINTED := $(VENV)/.installed-lint
DOCUMENTED := $(VENV)/.installed-docs
INTEROP := $(VENV)/.installed-interop
# What has no target of its own.
HERE := not pods and not gpu and not hosts and not interop and not engines

.PHONY: demo test test-fast test-hosts test-engines test-interop test-pods test-gpu lint site golden clean

demo: $(INSTALLED)
	$(BIN)/python -m launch.sweep demo.seeds --local.workers 2
	$(BIN)/python -m launch.evaluate runs/demo/seeds --chunk 64
	$(BIN)/python -m launch.compare runs/demo/seeds

test: $(TESTED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(HERE)"

test-fast: $(TESTED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(HERE) and not slow"

test-hosts: $(TESTED)
	$(BIN)/python -m pytest -n 0 -m hosts

test-interop: $(INTEROP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m interop

test-engines: $(TESTED) $(VENV)/engines
	@command -v slurmctld munged > /dev/null || { apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
	PATH="$(CURDIR)/$(VENV)/engines/bin:$$PATH" $(BIN)/python -m pytest -n 0 -m engines

# Peers with an environment of their own: they and our runtime ask for different versions of the same packages.
$(VENV)/engines: pyproject.toml
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check xpk==1.16.0 skypilot==0.14.1
	touch $@

# Not in the environment itself: with libtpu there, every start of jax would look for a TPU.
test-pods: $(TESTED) $(VENV)/libtpu
	PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m pytest -n 1 -m pods

# The version that jax asks for.
$(VENV)/libtpu: $(TESTED)
	$(BIN)/python -c "import importlib.metadata as m; print(*[r.split(';')[0] for r in m.requires('jax') if 'libtpu' in r])" \
		| xargs $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@
	touch $@

# The same. Without the rest of CUDA (4 GB), which only running needs.
test-gpu: $(TESTED) $(VENV)/cuda
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pytest -n 1 -m gpu

$(VENV)/cuda: $(TESTED)
	version=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('jax'))") \
		&& $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
			jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version 'nvidia-cudnn-cu12>=9.10,<10'
	touch $@

lint: $(LINTED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

site: $(DOCUMENTED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

golden: $(INSTALLED)
	$(BIN)/python -m tests.golden

# The stamps are the environment: touching a requirement makes it anew.
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/pyvenv.cfg requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(TESTED): $(VENV)/pyvenv.cfg requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $(INSTALLED) $@

$(LINTED): $(TESTED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[lint]"
	touch $@

$(DOCUMENTED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

$(INTEROP): $(TESTED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,interop]"
	touch $@

clean:
	rm -rf $(VENV) build runs data
