# From raw corpora to a report: `make` alone lists the targets, README.md explains them.
#
# Every step is a file that is written last and whole, so that make knows what a change makes stale, a killed step starts
# again or goes on, and a second `make eval` has nothing to do.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.SECONDEXPANSION:

EXPERIMENT ?= demo
# what `make eval` evaluates: for the demo its untuned base too, so that the report has two rows to compare
EXPERIMENTS ?= $(if $(filter demo,$(EXPERIMENT)),demo demo_base,$(EXPERIMENT))
RENDERED_EXPERIMENTS := $(notdir $(patsubst %/,%,$(wildcard factory_configs/*/)))
ifeq ($(filter $(EXPERIMENT),$(RENDERED_EXPERIMENTS)),)
  $(error no experiment '$(EXPERIMENT)' in factory_configs; there are $(RENDERED_EXPERIMENTS); after a change of experiments.yaml run `make configs`)
endif
ifneq ($(filter demo%,$(EXPERIMENT)),)
  RAW ?= dataset_info/samples/raw
  EXAMS ?= dataset_info/samples/exams
  DATA := data/demo
  # dozens of sample records with deliberate dirt: one bad record is more than the usual 1 %
  MAX_REJECTS ?= 0.1
  export HF_HUB_OFFLINE ?= 1
else
  RAW ?= data/raw
  EXAMS ?= data/exams
  DATA := data/full
  MAX_REJECTS ?= 0.01
endif
ARGS ?=
# what single experiments need: pyproject.toml's gpu, qlora, distributed
EXTRAS ?=
comma := ,
# a cleaner variant of the data: --drop-overlap --drop-duplicates --mask-personal-data
DATA_ARGS ?=
SHOTS ?= 0
# who answers the test set: llamafactory here, or api, an OpenAI-style endpoint; the answers are the same, so that a change
# of it makes nothing stale
BACKEND ?= llamafactory
API_BASE ?= http://127.0.0.1:8000/v1
ifeq ($(filter $(BACKEND),llamafactory api),)
  $(error BACKEND is '$(BACKEND)', must be llamafactory or api)
endif
API_ARGS ?=
REPORT_LANG ?= en
PYTHON ?= python3
export USE_MODELSCOPE_HUB ?= 1

BIN := .venv/bin
MEDASST := $(BIN)/medasst
export PATH := $(CURDIR)/$(BIN):$(PATH)
INSTALLED := .venv/.installed
RENDERED := .venv/.rendered
TUNED := $(patsubst factory_configs/%/train.yaml,%,$(wildcard factory_configs/*/train.yaml))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  EXPERIMENT=$(EXPERIMENT) ($(RENDERED_EXPERIMENTS)), RAW=$(RAW), EXAMS=$(EXAMS), ARGS=key=value..."

# ---- environment ----------------------------------------------------------------------------------------------------
.PHONY: setup constraints
setup: $(INSTALLED) ## install everything, pinned, into .venv (EXTRAS=gpu,qlora,distributed)

$(INSTALLED): pyproject.toml constraints.txt $(if $(EXTRAS),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; try make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --constraint constraints.txt uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	touch $@

constraints: ## pin every package anew into constraints.txt, for all supported Pythons
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv; }
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-emit-index-url --no-header --no-annotate pyproject.toml --output-file constraints.txt

# ---- data and configs -----------------------------------------------------------------------------------------------
.PHONY: download data audit configs FORCE
FORCE:
# FORCE where a step's inputs are named otherwise than when its output was made
one_word = x$(subst $(eval) ,_,$(strip $(1)))x
changed = $(if $(filter-out $(call one_word,$(1)),$(call one_word,$(shell cat $(2) 2>/dev/null))),FORCE)

# the demo's HF_HUB_OFFLINE=1 is not meant here; one from the environment is
download: $(INSTALLED) ## fetch all corpora and exams into data/raw and data/exams (NAMES="cmtmedqa ceval medasst")
	$(if $(filter file,$(origin HF_HUB_OFFLINE)),HF_HUB_OFFLINE=0) $(MEDASST) download $(NAMES)

data: $(DATA)/manifest.json ## convert RAW into a LLaMA-Factory dataset_dir

$(DATA)/manifest.json: $(wildcard $(RAW)/*/*) $(wildcard dataset_info/corpora.yaml) $(call changed,$(RAW) $(DATA_ARGS),$(DATA)/.raw) | $(INSTALLED)
	$(MEDASST) convert --raw-dir $(RAW) --out-dir $(DATA) --max-rejects $(MAX_REJECTS) $(DATA_ARGS)
	echo '$(RAW) $(DATA_ARGS)' > $(DATA)/.raw

audit: $(DATA)/audit.json ## duplicates, test questions in training, lengths, personal data (AUDIT_ARGS="--tokenizer DIR")

$(DATA)/audit.json: $(DATA)/manifest.json $(wildcard $(EXAMS)/* $(EXAMS)/*/*/*) | $(INSTALLED)
	$(MEDASST) audit --data-dir $(DATA) --exams-dir $(EXAMS) $(AUDIT_ARGS)

configs: $(RENDERED) ## render factory_configs/ from experiments.yaml and templates/

$(RENDERED): factory_configs/experiments.yaml $(wildcard templates/*.yaml.j2) | $(INSTALLED)
	$(MEDASST) render
	touch $@

# render leaves an unchanged file alone, so only what a change reaches is stale
$(foreach kind,tokenize train predict chat export,factory_configs/%/$(kind).yaml): | $(RENDERED) ;

# ---- training -------------------------------------------------------------------------------------------------------
.PHONY: tokenize train
# where an experiment's training set is tokenised before the training; empty for most
TOKENS := $(shell sed -n 's/^tokenized_path: \([^ ]*\).*/\1/p' factory_configs/$(EXPERIMENT)/tokenize.yaml 2>/dev/null)

tokenize: $(if $(TOKENS),$(TOKENS)/made_of.json) ## make EXPERIMENT's tokens once, for a training on many GPUs
	@$(if $(TOKENS),:,echo "make: $(EXPERIMENT) tokenises as it trains; its entry has no tokenize_once" >&2; exit 2)

ifneq ($(TOKENS),)
$(TOKENS)/made_of.json: factory_configs/$(EXPERIMENT)/tokenize.yaml $(DATA)/manifest.json | $(INSTALLED)
	$(MEDASST) tokenize $< $(ARGS)
	[ ! -e $@ ] || touch $@

saves/$(EXPERIMENT)/run.json: $(TOKENS)/made_of.json
endif

# NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID, MIN_NNODES, MAX_NNODES and MAX_RESTARTS, given to
# make or in the environment, reach llamafactory-cli as they are: docs/distributed.md
train: saves/$(EXPERIMENT)/run.json ## train EXPERIMENT through llamafactory-cli; a killed run goes on

saves/tiny_qwen2/config.json: $(DATA)/manifest.json | $(INSTALLED)
	$(MEDASST) tiny-model --data-dir $(DATA) --out $(@D)

saves/%/run.json: factory_configs/%/train.yaml $(DATA)/manifest.json | $(INSTALLED)
	$(MEDASST) train $< $(ARGS)
	touch -c $@

saves/demo_base/run.json: saves/tiny_qwen2/config.json
saves/demo/run.json: saves/demo_base/run.json

# ---- evaluation -----------------------------------------------------------------------------------------------------
.PHONY: predict exam report eval
predict: results/$(EXPERIMENT)/generated_predictions.jsonl ## answer the dialogue test set (BACKEND=api API_BASE=URL: through an endpoint)
exam: results/$(EXPERIMENT)/exam.json ## answer the exam questions (SHOTS=0 or 5)
report: results/report.md ## write results/report.md and report.html (REPORT_LANG=zh)
eval: results/report.md ## everything, from installation to report (EXPERIMENTS="demo demo_base")

# a tuned model must be trained before it answers; one behind an endpoint is there already
LOCAL_PREDICTIONS = $(if $(filter api,$(BACKEND)),,results/$(1)/generated_predictions.jsonl)
$(foreach name,$(TUNED),$(eval $(call LOCAL_PREDICTIONS,$(name)) results/$(name)/exam.json results/$(name)/safety.json: saves/$(name)/run.json))

ifeq ($(BACKEND),api)
results/%/generated_predictions.jsonl: factory_configs/%/predict.yaml $(DATA)/manifest.json | $(INSTALLED)
	$(MEDASST) predict $< --api-base $(API_BASE) $(API_ARGS)
	rm -f $(@D)/predict_results.json  # of an earlier run through LLaMA-Factory
else
results/%/generated_predictions.jsonl: factory_configs/%/predict.yaml $(DATA)/manifest.json | $(INSTALLED)
	$(MEDASST) generate $< $(ARGS)
endif

results/%/scores.json: results/%/generated_predictions.jsonl
	$(MEDASST) score $< --out $@ --per-record $(@D)/per_record.jsonl --predict-config factory_configs/$*/predict.yaml

results/%/exam.json: factory_configs/%/chat.yaml $(wildcard $(EXAMS)/* $(EXAMS)/*/*/*) dataset_info/exams.yaml $$(call changed,$(EXAMS) $(SHOTS),results/$$*/.exams) | $(INSTALLED)
	$(MEDASST) exam $< --exams-dir $(EXAMS) --out $(@D) --shots $(SHOTS)
	echo '$(EXAMS) $(SHOTS)' > $(@D)/.exams

results/report.md: $(foreach name,$(EXPERIMENTS),results/$(name)/scores.json results/$(name)/exam.json) $(wildcard results/*/safety.json templates/report*) dataset_info/paper.yaml $$(call changed,$(REPORT_LANG),results/.lang)
	$(MEDASST) report --lang $(REPORT_LANG)
	echo '$(REPORT_LANG)' > results/.lang

# ---- in use ---------------------------------------------------------------------------------------------------------
.PHONY: chat chat-cli api export safety
# a model that is there is used as it is: asking it something trains nothing again
TRAINED_IF_MISSING = $(if $(filter $(EXPERIMENT),$(TUNED)),$(if $(wildcard saves/$(EXPERIMENT)/run.json),,saves/$(EXPERIMENT)/run.json))
CHAT_CONFIG := factory_configs/$(EXPERIMENT)/chat.yaml

chat: $(TRAINED_IF_MISSING) | $(INSTALLED) $(RENDERED) ## the chat page on http://127.0.0.1:7860 (GRADIO_SERVER_PORT)
	$(MEDASST) chat $(CHAT_CONFIG) $(ARGS)

chat-cli: $(TRAINED_IF_MISSING) | $(INSTALLED) $(RENDERED) ## the same in the terminal
	$(MEDASST) chat --terminal $(CHAT_CONFIG) $(ARGS)

api: $(TRAINED_IF_MISSING) | $(INSTALLED) $(RENDERED) ## an OpenAI-style server on http://127.0.0.1:8000/v1 (API_PORT, API_KEY, API_HOST)
	$(MEDASST) api factory_configs/$(EXPERIMENT)/chat.yaml $(API_ARGS) $(ARGS)

export: saves/$(EXPERIMENT)_merged/export.json ## the adapter merged into its base, with a model card: saves/EXPERIMENT_merged

# made anew after another training, and its card after other scores; that neither is run for it
saves/%_merged/export.json: factory_configs/%/export.yaml templates/model_card.md.j2 dataset_info/base_models.yaml $$(if $$(ARGS)$$(shell find saves/$$*/run.json results/$$*/*.json -newer $$@ 2>/dev/null),FORCE) | $$(TRAINED_IF_MISSING) $(INSTALLED)
	$(MEDASST) export $< $(ARGS)
	test ! -f $@ || touch $@  # not there if ARGS said another export_dir

safety: results/$(EXPERIMENT)/safety.json ## what the model says to red flags, false premises... (SAFETY_ARGS="--set FILE")

results/%/safety.json: factory_configs/%/chat.yaml $(wildcard dataset_info/safety/*) $$(call changed,$(SAFETY_ARGS),results/$$*/.safety) | $(INSTALLED)
	$(MEDASST) safety $< --out $(@D) $(SAFETY_ARGS)
	echo '$(SAFETY_ARGS)' > $(@D)/.safety

# ---- the project itself ---------------------------------------------------------------------------------------------
.PHONY: doctor test test-slow lint format screenshot bench bench-score bench-data bench-predict bench-train bench-gpu clean
doctor: $(INSTALLED) ## what this machine has and EXPERIMENT needs: versions, data, model, memory, disk, hours
	$(MEDASST) doctor $(EXPERIMENT)

test: $(INSTALLED) ## every test
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-slow: $(INSTALLED) ## the long forms: ten kills of `make train`, two machines resumed, a worker that dies
	$(BIN)/pytest -m slow $(ARGS)

lint: $(INSTALLED) ## check style and that the rendered configs are what experiments.yaml says
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MEDASST) render --check

format: $(INSTALLED) ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshot: saves/demo/run.json | $(INSTALLED) ## docs/chat.png anew: the chat page of the demo, in chromium
	$(BIN)/python tests/chat_browser.py --out docs/chat.png

bench: $(INSTALLED) ## time and memory of each step of `make eval` (ARGS="--with-setup RAW=... EXAMS=...")
	$(BIN)/python benchmarks/bench_steps.py $(ARGS)

bench-score: $(INSTALLED) ## scores and exams against LLaMA-Factory's own way (ARGS="--exams-dir data/exams")
	$(BIN)/python benchmarks/bench_score.py $(ARGS)

bench-data: $(INSTALLED) ## convert and audit at full size, against a floor and the usual ways (ARGS="--scale 0.1")
	$(BIN)/python benchmarks/bench_data.py $(ARGS)

bench-predict: $(TRAINED_IF_MISSING) $(DATA)/manifest.json | $(INSTALLED) ## predict in parts against LLaMA-Factory's own order and batch
	$(BIN)/python benchmarks/bench_predict.py factory_configs/$(EXPERIMENT)/predict.yaml $(ARGS)

bench-train: $(INSTALLED) ## padding against packing and like-length batches, tiny model (ARGS="--data-dir data/real")
	$(BIN)/python benchmarks/bench_train.py $(ARGS)

bench-gpu: $(INSTALLED) ## memory, speed and hours of Qwen2-7B's shape on this machine's GPU (ARGS="--cpu" for a tiny shape)
	$(BIN)/python benchmarks/bench_gpu.py $(ARGS)

clean: ## remove what runs made: data/demo, saves/, results/ (not data/raw, data/exams, data/full, .venv)
	rm -rf data/demo saves results
