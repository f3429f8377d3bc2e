# `make` alone lists the targets; README.md explains them. A target runs verbs of `medasst`; which ones of an experiment, and
# in which order, is in medasst_tools/steps.py. Each verb knows what its output was made of: where nothing differs it ends.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# ---- variables of the command line, `make eval EXPERIMENT=medasst`; all of them reach `medasst` in its environment
KNOWN := EXPERIMENT EXPERIMENTS ARGS RESTART EXTRAS DATA_ARGS SHOTS BACKEND API_BASE API_ARGS AUDIT_ARGS EXAM_ARGS SAFETY_ARGS \
  RAW EXAMS MAX_REJECTS NAMES PYTHON V MEDASST
# what LLaMA-Factory, torchrun, uv and the hubs' clients read
THEIRS := API_% CHAT_% CUDA_% GRADIO_% HF_% MASTER_% MEDASST_% MODELSCOPE_% N% OMP_% PIP_% RDZV_% USE_% UV_% MAX_CONCURRENT
export EXPERIMENT ?= demo
EXTRAS ?= $(if $(filter smollm2%,$(EXPERIMENT)),real)# pyproject.toml's gpu, qlora, distributed, real, readers, judge
PYTHON ?= python3
MEDASST := .venv/bin/medasst
CONFIGS := factory_configs/$(EXPERIMENT)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export USE_MODELSCOPE_HUB ?= 1
ifneq ($(filter demo% smollm2%,$(EXPERIMENT)),)
  export HF_HUB_OFFLINE ?= 1# no hub is meant: a wrong path fails at once
endif
# Chinese where medasst's messages are: medasst_tools/language.py
ZH := $(filter zh%,$(firstword $(MEDASST_LANG) $(LC_ALL) $(LC_MESSAGES) $(LANG)))
ifeq ($(wildcard medasst_tools/cli.py),)
  $(error $(if $(ZH),请在项目目录下运行 make（make -C 目录）,run make in the project's folder (make -C FOLDER)))
endif
typed := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
wrong := $(filter-out $(KNOWN) $(THEIRS),$(typed))
ifneq ($(wrong),)
  $(error $(if $(ZH),没有 make 变量 $(wrong)；可用的有 $(KNOWN),no make variable $(wrong); there are $(KNOWN)))
endif

.PHONY: help setup constraints download configs data audit train model predict exam score safety eval report chat chat-cli \
  api export doctor test test-slow lint format screenshot bench bench-data bench-score bench-train bench-predict bench-gpu \
  bench-exam bench-lengths clean
help: ## list the targets ## 列出所有目标
	@awk -F ' ## ' '/^[a-z-]+:.* ## / {sub(/:.*/, "", $$1); printf "  make %-12s %s\n", $$1, $$$(if $(ZH),3,2)}' Makefile
	@echo "  EXPERIMENT=$(EXPERIMENT), RAW=data/raw, EXAMS=data/exams, ARGS=key=value..., RESTART=1"

# ---- environment, configs, data
setup: ## install everything, pinned, into .venv, from pip's mirror if it has one (EXTRAS=gpu,qlora,distributed) ## 把固定版本的依赖装进 .venv；pip 配了镜像就用镜像（EXTRAS=gpu,qlora,distributed）
	@PYTHON="$(PYTHON)" ./install.sh $(EXTRAS)

constraints: setup ## pin every package anew into constraints.txt, for all supported Pythons ## 重新固定 constraints.txt 里的全部版本，适用于所有支持的 Python
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-emit-index-url --no-header --no-annotate pyproject.toml --output-file constraints.txt

download: setup ## fetch all corpora and exams into data/raw and data/exams (NAMES="cmtmedqa ceval medasst") ## 把全部语料和考题下载到 data/raw 和 data/exams（NAMES="cmtmedqa ceval medasst"）
	$(if $(filter file,$(origin HF_HUB_OFFLINE)),HF_HUB_OFFLINE=0) $(MEDASST) download $(NAMES)

configs: setup ## render factory_configs/ from experiments.yaml and templates/ ## 由 experiments.yaml 和 templates/ 渲染 factory_configs/
	@$(MEDASST) render

# ---- an experiment: `model` trains it unless it is there, `score` scores its answers that are there
# NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID... reach llamafactory-cli as they are: docs/distributed.md
data: ## convert RAW into EXPERIMENT's dataset_dir ## 把 RAW 转换成 EXPERIMENT 的 dataset_dir
audit: ## duplicates, test questions in training, lengths, personal data (AUDIT_ARGS="--tokenizer DIR") ## 重复、训练集中的测试题、长度、个人信息（AUDIT_ARGS="--tokenizer DIR"）
train: ## train EXPERIMENT through llamafactory-cli; a killed run goes on (RESTART=1: anew) ## 用 llamafactory-cli 训练 EXPERIMENT；中断后接着训练（RESTART=1：重新训练）
predict: ## answer the dialogue test set (BACKEND=api API_BASE=URL: through an endpoint) ## 回答对话测试集（BACKEND=api API_BASE=URL：通过服务端）
exam: ## answer the exam questions (SHOTS=0 or 5) ## 回答考题（SHOTS=0 或 5）
safety: ## what the model says to red flags, false premises... (SAFETY_ARGS="--set FILE") ## 模型如何回答危险信号、错误前提等问题（SAFETY_ARGS="--set FILE"）
export: ## the adapter merged into its base, with a model card: saves/EXPERIMENT_merged ## 把适配器合并进基座，附模型卡：saves/EXPERIMENT_merged
eval: ## everything, from installation to report (EXPERIMENTS="demo_base demo") ## 从安装到报告的全部步骤（EXPERIMENTS="demo_base demo"）
data audit train model predict exam score safety export eval: setup
	@$(MEDASST) steps $@

report: setup ## write results/report.md, report_zh.md and report.html ## 生成 results/report.md、report_zh.md 和 report.html
	@$(MEDASST) report

# ---- in use
chat: model ## the chat page on http://127.0.0.1:7860 (GRADIO_SERVER_PORT) ## 聊天页面 http://127.0.0.1:7860（GRADIO_SERVER_PORT）
	@$(MEDASST) chat $(CONFIGS)/chat.yaml $(ARGS)

chat-cli: model ## the same in the terminal ## 在终端里聊天
	@$(MEDASST) chat --terminal $(CONFIGS)/chat.yaml $(ARGS)

api: model ## an OpenAI-style server on http://127.0.0.1:8000/v1 (API_PORT, API_KEY, API_HOST) ## OpenAI 风格的服务 http://127.0.0.1:8000/v1（API_PORT、API_KEY、API_HOST）
	@$(MEDASST) api $(CONFIGS)/chat.yaml $(API_ARGS) $(ARGS)

doctor: setup ## what this machine has and EXPERIMENT needs: versions, data, model, memory, disk, hours ## 本机有什么、EXPERIMENT 需要什么：版本、数据、模型、显存、磁盘、时间
	@$(MEDASST) doctor $(EXPERIMENT)

# ---- the project itself
test: setup ## every test ## 全部测试
	.venv/bin/pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-slow: setup ## the long forms: ten kills of `make train`, two machines, a worker that dies ## 长测试：把 `make train` 终止十次、两台机器、工作进程意外退出
	.venv/bin/pytest -m slow $(ARGS)

lint: setup ## check style and that the rendered configs are what experiments.yaml says ## 检查代码风格，以及渲染的配置是否与 experiments.yaml 一致
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check
	$(MEDASST) render --check

format: setup ## fix style ## 修正代码风格
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

screenshot: model ## docs/chat.png anew: the chat page of the demo, in chromium ## 重新生成 docs/chat.png：chromium 中的 demo 聊天页面
	.venv/bin/python tests/chat_browser.py --out docs/chat.png

bench: setup ## time and memory of each step of `make eval` (ARGS="--with-setup RAW=... EXAMS=...") ## `make eval` 每一步的时间和内存（ARGS="--with-setup RAW=... EXAMS=..."）
	.venv/bin/python benchmarks/bench_steps.py $(ARGS)

bench-data bench-score bench-train bench-predict bench-gpu: setup # against what one would use instead: docs/benchmarks.md
	.venv/bin/python benchmarks/$(subst -,_,$@).py $(ARGS)

bench-exam: export # lm-eval's answers beside ours; make setup EXTRAS=readers
	.venv/bin/python benchmarks/bench_exam.py $(CONFIGS)/chat.yaml --exported saves/$(EXPERIMENT)_merged --exams-dir "$(or $(EXAMS),dataset_info/samples/exams)"

bench-lengths: setup # records in Qwen2's own tokens; make setup EXTRAS=real
	.venv/bin/python benchmarks/bench_lengths.py --raw-dir "$(or $(RAW),data/raw)"

clean: ## remove what the demo made; no other model, no other result ## 删除 demo 生成的内容；不动其他模型和结果
	rm -rf data/demo $(foreach name,demo demo_base demo_dpo demo_merged tiny_qwen2,saves/$(name) saves/.$(name).lock results/$(name))
