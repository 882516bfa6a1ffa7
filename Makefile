# Everything runs in .venv. Interrupted targets resume.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := .uv/bin/uv
RUN := runs/quickstart
# Installs the versions of uv.lock for Python 3.11 to 3.13; uv downloads a missing Python.  Bytecode is compiled here:
# without write access, each process would compile torch and transformers itself, which doubles its start-up time.
SYNC := UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync --locked --inexact --quiet --compile-bytecode

.DEFAULT_GOAL := help
.PHONY: help install plan quickstart demo photographs ablations baselines test test-fast test-dist test-slow test-faults test-gpu test-pip-resolution lint dist docs bench bench-gpu clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

$(UV):
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv==0.13.9

$(VENV)/.base: pyproject.toml uv.lock | $(UV)
	@echo 'installing (a minute with a fast connection, 7 GB)'
	$(SYNC) --group quickstart
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(SYNC) --group dev
	@touch $@

$(VENV)/.photographs: $(VENV)/.base
	$(SYNC) --group photographs
	@touch $@

$(VENV)/.ablations: $(VENV)/.base
	$(SYNC) --group ablations
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(SYNC) --extra demo
	@touch $@

$(VENV)/.baselines: $(VENV)/.base
	$(SYNC) --group baselines
	@touch $@

install: $(VENV)/.base  ## install the requirements of the recipes and the quickstart into .venv

plan: $(VENV)/.base  ## hours, price and disk of CLIP L/14-336 with Llama-3.1-8B on 3M images and 8 GPUs, without a GPU
	$(BIN)/python recipes/run.py yamls/pipelines/paper_cc3m.yaml plan=true

# --------------------------------------------------------------------------------------------------- quickstart
quickstart: $(VENV)/.base  ## install, then data → stage 1 → embeddings → stage 2 → evaluation → export → report
	$(BIN)/python recipes/run.py yamls/pipelines/quickstart.yaml

$(RUN)/report.html:
	$(MAKE) quickstart

demo: $(VENV)/.demo | $(RUN)/images  ## search and classify on a page, with the quickstart's model; IMAGES=… a folder
	$(BIN)/python recipes/demo.py model=$(RUN)/export/llm2clip images=$(or $(IMAGES),$(RUN)/images) \
		index=$(RUN)/search$(subst /,_,$(IMAGES))

# Emoji in the style that was not trained on, as files that are named after them.
$(RUN)/images: | $(RUN)/report.html
	@rm -rf $@.tmp && mkdir $@.tmp
	@$(BIN)/python -c "from pathlib import Path; from llm2clip.data.schema import read_samples; \
		[Path('$@.tmp', sample['caption.short'] + '.png').write_bytes(sample['image']) \
		for sample in read_samples('$(RUN)/data/emoji/unseen_style')]"
	@mv $@.tmp $@

# --------------------------------------------------------------------------------------------------- photographs
PHOTOGRAPHS := runs/flickr8k
# Captions of Flickr8k: the official file, Karpathy's, or Kaggle's, which has no splits.
ANNOTATIONS = $(firstword $(wildcard $(addprefix $(DATA)/,Flickr8k.token.txt dataset_flickr8k.json captions.txt)))
PHOTOS = $(firstword $(wildcard $(addprefix $(DATA)/,Flicker8k_Dataset Images images)))
HOLDOUT := "splits='source.holdout={val: 1000, test: 1000}'"
SPLITS = $(if $(filter %/captions.txt,$(ANNOTATIONS)),$(HOLDOUT))

photographs: $(VENV)/.photographs  ## the same pipeline on Flickr8k in DATA=…
	@[ -n "$(PHOTOS)" ] && [ -n "$(ANNOTATIONS)" ] || { echo 'make photographs DATA=<folder>: expected Flickr8k there,' \
		'Flicker8k_Dataset/ (or Images/) with Flickr8k.token.txt, dataset_flickr8k.json or captions.txt'; exit 1; }
	$(BIN)/python recipes/run.py yamls/pipelines/photographs.yaml images=$(PHOTOS) annotations=$(ANNOTATIONS) $(SPLITS)

$(PHOTOGRAPHS)/report.html:
	$(MAKE) photographs

ablations: $(VENV)/.ablations | $(PHOTOGRAPHS)/report.html  ## the paper's claims on Flickr8k (hours; resumable)
	$(BIN)/python -m recipes.ablations.run align
	$(BIN)/python -m recipes.ablations.run photograph
	$(BIN)/python -m recipes.ablations.run stage1

baselines: $(VENV)/.baselines | $(PHOTOGRAPHS)/report.html  ## compare with open_clip, sentence-transformers
	for seed in 17 1 2; do SEED=$$seed $(BIN)/python -m recipes.baselines.run || exit 1; done

# --------------------------------------------------------------------------------------------------- development
# Several tests run at once, whose threads would wait for each other's cores if they spun.
test test-fast test-dist test-slow test-faults test-pip-resolution: export OMP_WAIT_POLICY ?= passive

test: $(VENV)/.dev  ## run all tests except slow tests and GPU tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not gpu and not slow and not faults' --durations 10

test-fast: $(VENV)/.dev  ## run the tests without training and exports (a minute)
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not gpu and not slow and not faults and not dist and not long'

test-dist: $(VENV)/.dev  ## run the tests that start two ranks
	$(BIN)/python -m pytest -m 'dist and not slow'

test-slow: $(VENV)/.dev $(VENV)/.ablations  ## run the slow tests: 110 kills, a bad connection, 64 workers, GPU tests on the CPU (an hour)
	$(BIN)/python -m pytest -m slow -s
	DEVICE=cpu $(BIN)/python -m pytest -m gpu

# Finished cases are in runs/faults; `make test-faults` goes on with the others.
test-faults: $(VENV)/.dev  ## kill each recipe, or let a call fail, at every call that changes files (an hour; resumable)
	$(BIN)/python -m pytest -n auto --dist worksteal -m faults; status=$$?; \
		PYTHONPATH=. $(BIN)/python tests/faults.py results/faults.json; exit $$status

DEVICE ?= gpu
test-gpu: $(VENV)/.dev  ## run the tests that need a GPU; DEVICE=cpu checks these tests on the CPU
	DEVICE=$(DEVICE) $(BIN)/python -m pytest -m gpu --durations 10

# pip ignores uv.lock and installs the newest versions that Composer and Streaming allow.
.venv-pip/.done: pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --seed .venv-pip
	.venv-pip/bin/pip install --quiet --editable '.[dev,quickstart]'
	@touch $@

test-pip-resolution: .venv-pip/.done  ## run some tests with the packages of `pip install -e .`
	.venv-pip/bin/python -m pytest -n auto --dist worksteal -m 'not gpu and not slow' tests/export tests/models \
		tests/recipes/test_resumption.py tests/training/test_stage2.py tests/recipes/test_training.py \
		tests/teacher/test_architectures.py tests/test_two_ranks.py --ignore tests/export/test_adapters.py

lint: $(VENV)/.dev  ## run ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright

dist: $(UV)  ## build the package for PyPI in dist/ and check it
	rm -rf dist
	$(UV) build --quiet
	$(UV) tool run twine check --strict dist/*

docs: $(VENV)/.dev  ## update the tables of the pages from results/ and build the site in build/docs
	$(BIN)/python docs/tables.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

bench: $(VENV)/.dev  ## run the benchmarks of recipes/benchmarks/, or only NAME=…
	@mkdir -p runs/bench && touch runs/bench/.begun
	for name in $(or $(NAME),cost stage1_step blockwise_loss); do \
		$(BIN)/python -m recipes.benchmarks.$$name || exit 1; done
	! find runs/bench -name '*.json' -newer runs/bench/.begun -exec grep -l '"meets": false' {} +

bench-gpu: $(VENV)/.dev  ## measure speed and memory on one NVIDIA GPU (resumable)
	$(BIN)/python -m recipes.benchmarks.gpu.run_all $(DEVICE) $(NAME)

clean:  ## remove runs/quickstart, builds and caches; all other runs and .venv stay
	rm -rf $(RUN) build dist *.egg-info .pytest_cache .ruff_cache
