# Everything runs in .venv. Finished targets are skipped; interrupted ones resume.
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

$(VENV)/.demo: $(VENV)/.base
	$(SYNC) --extra demo
	@touch $@

$(VENV)/.baselines: $(VENV)/.base
	$(SYNC) --group baselines
	@touch $@

install: $(VENV)/.base  ## install the requirements of the recipes and the quickstart into .venv

plan: $(VENV)/.base  ## hours, price and disk of CLIP L/14-336 with Llama-3.1-8B on 3M images and 8 GPUs, without a GPU
	$(BIN)/python recipes/plan.py yamls/plan/paper.yaml

# --------------------------------------------------------------------------------------------------- quickstart
# $(call step,number,recipe and its file): runs a step of the quickstart and prints how long it took.
define step
	@echo 'step $(1) of 8: $(BIN)/python recipes/$(2)'
	@start=$$(date +%s); $(BIN)/python recipes/$(2); status=$$?; \
		[ $$status = 0 ] && echo "step $(1) of 8 took $$(($$(date +%s) - start)) s"; exit $$status
endef

quickstart: $(RUN)/report.html  ## install, then data → stage 1 → embeddings → stage 2 → evaluation → export → report
	@$(BIN)/python -c "import json; sets = json.load(open('$(RUN)/evaluate/results.json'))['retrieval']; \
		recall = lambda name: sets[name]['models']['llm2clip']['image_retrieval_recall@10']; \
		print(f'text → image R@10: {recall(\"unseen_style\"):.1f} % on the unseen style,', \
			f'{recall(\"unseen_concepts\"):.1f} % on unseen concepts')"
	@echo 'report: $(RUN)/report.html'
	@echo 'make demo serves a page that searches and classifies images with this model'

$(RUN)/data/emoji/config.yaml: | $(VENV)/.base
	$(call step,1,prepare_data.py yamls/data/quickstart_emoji.yaml)

$(RUN)/data/wikipedia/config.yaml: | $(RUN)/data/emoji/config.yaml
	$(call step,2,prepare_data.py yamls/data/quickstart_wikipedia.yaml)

$(RUN)/stage1/teacher/text_encoder.json: | $(RUN)/data/wikipedia/config.yaml
	$(call step,3,train_stage1.py yamls/stage1/quickstart.yaml)

$(RUN)/embeddings/config.yaml: | $(RUN)/stage1/teacher/text_encoder.json
	$(call step,4,extract_embeddings.py yamls/extract/quickstart.yaml)

$(RUN)/stage2/finished: | $(RUN)/embeddings/config.yaml
	$(call step,5,train_stage2.py yamls/stage2/quickstart.yaml)
	@touch $@

$(RUN)/evaluate/finished: | $(RUN)/stage2/finished
	$(call step,6,evaluate.py yamls/eval/quickstart.yaml)
	@touch $@

$(RUN)/export/config.yaml: | $(RUN)/evaluate/finished
	$(call step,7,export_hf.py yamls/export/quickstart.yaml)

$(RUN)/report.html: | $(RUN)/export/config.yaml
	$(call step,8,report.py yamls/report/quickstart.yaml)

demo: $(VENV)/.demo | $(RUN)/images  ## search and classify on a page, with the quickstart's model; IMAGES=… a folder
	$(BIN)/python recipes/demo.py model=$(RUN)/export/llm2clip images=$(or $(IMAGES),$(RUN)/images) \
		index=$(RUN)/search$(subst /,_,$(IMAGES))

# Emoji in the style that was not trained on, as files that are named after them.
$(RUN)/images: | $(RUN)/export/config.yaml
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
HOLDOUT := 'source.holdout={val: 1000, test: 1000}'
SPLITS = $(if $(filter %/captions.txt,$(ANNOTATIONS)),$(HOLDOUT))

photographs: $(PHOTOGRAPHS)/report.html  ## the same pipeline on Flickr8k in DATA=…

$(PHOTOGRAPHS)/data/config.yaml: | $(VENV)/.base
	@[ -n "$(PHOTOS)" ] && [ -n "$(ANNOTATIONS)" ] || { echo 'make photographs DATA=<folder>: expected Flickr8k there,' \
		'Flicker8k_Dataset/ (or Images/) with Flickr8k.token.txt, dataset_flickr8k.json or captions.txt'; exit 1; }
	$(BIN)/python recipes/prepare_data.py yamls/flickr8k/prepare.yaml source.images=$(PHOTOS) \
		source.annotations=$(ANNOTATIONS) $(SPLITS)

$(PHOTOGRAPHS)/stage1/teacher/text_encoder.json: | $(PHOTOGRAPHS)/data/config.yaml
	$(BIN)/python recipes/train_stage1.py yamls/flickr8k/stage1.yaml

$(PHOTOGRAPHS)/embeddings/config.yaml: | $(PHOTOGRAPHS)/stage1/teacher/text_encoder.json
	$(BIN)/python recipes/extract_embeddings.py yamls/flickr8k/extract.yaml

$(PHOTOGRAPHS)/image_embeddings/config.yaml: | $(PHOTOGRAPHS)/data/config.yaml
	$(BIN)/python recipes/extract_image_embeddings.py yamls/flickr8k/align_extract.yaml

$(PHOTOGRAPHS)/align/finished: | $(PHOTOGRAPHS)/embeddings/config.yaml $(PHOTOGRAPHS)/image_embeddings/config.yaml
	$(BIN)/python recipes/train_stage2.py yamls/flickr8k/align.yaml
	@touch $@

$(PHOTOGRAPHS)/evaluate/finished: | $(PHOTOGRAPHS)/align/finished
	$(BIN)/python recipes/evaluate.py yamls/flickr8k/evaluate.yaml
	@touch $@

$(PHOTOGRAPHS)/export/config.yaml: | $(PHOTOGRAPHS)/evaluate/finished
	$(BIN)/python recipes/export_hf.py yamls/flickr8k/export.yaml

$(PHOTOGRAPHS)/report.html: | $(PHOTOGRAPHS)/export/config.yaml
	$(BIN)/python recipes/report.py yamls/flickr8k/report.yaml

ablations: | $(PHOTOGRAPHS)/embeddings/config.yaml  ## the paper's claims on Flickr8k (hours; resumable)
	$(BIN)/python -m recipes.ablations.run align
	$(BIN)/python -m recipes.ablations.run photograph
	$(BIN)/python -m recipes.ablations.run stage1

baselines: $(VENV)/.baselines | $(PHOTOGRAPHS)/data/config.yaml  ## compare with open_clip, sentence-transformers
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

test-slow: $(VENV)/.dev  ## run the slow tests: 110 kills, a bad connection, 64 workers (an hour)
	$(BIN)/python -m pytest -m slow -s

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
	for name in $(or $(NAME),cost stage1_step stage2_step); do \
		$(BIN)/python -m recipes.benchmarks.$$name || exit 1; done
	! find runs/bench -name '*.json' -newer runs/bench/.begun -exec grep -l '"meets": false' {} +

bench-gpu: $(VENV)/.dev  ## measure speed and memory on one NVIDIA GPU (resumable)
	$(BIN)/python -m recipes.benchmarks.gpu.run_all $(DEVICE) $(NAME)

clean:  ## remove runs/quickstart, builds and caches; all other runs and .venv stay
	rm -rf $(RUN) build dist *.egg-info .pytest_cache .ruff_cache
