# From raw corpora to a report: `make` alone lists the targets, README.md explains them. A target only runs the verbs of
# `medasst` one after the other; each verb knows what its output was made of and does nothing where nothing differs.
# Several in one call, `medasst A then B`, import what is heavy once.
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
EXTRAS ?= $(if $(filter smollm2%,$(EXPERIMENT)),real)# what single experiments need: pyproject.toml's gpu, qlora, distributed, real, readers, judge
DATA_ARGS ?=# a cleaner variant of the data: --drop-overlap --drop-duplicates --mask-personal-data
SHOTS ?= 0
BACKEND ?= llamafactory
API_BASE ?= http://127.0.0.1:8000/v1
API_ARGS ?=
PYTHON ?= python3
comma := ,
# what make says is Chinese where medasst's messages are: medasst_tools/language.py
ZH := $(filter zh%,$(firstword $(MEDASST_LANG) $(LC_ALL) $(LC_MESSAGES) $(LANG)))

CONFIGS := factory_configs/$(EXPERIMENT)
SAVES := saves/$(EXPERIMENT)
RESULTS := results/$(EXPERIMENT)
# read when a recipe runs, after `configs` has rendered: a key of an experiment's config; the folder of the data
setting = $(shell sed -n 's|^$(3): *\([^ #]*\).*|\1|p' factory_configs/$(1)/$(2).yaml 2>/dev/null)
DATA = $(call setting,$(EXPERIMENT),predict,dataset_dir)
# a model's folder in saves/ with those that must be there first, oldest first
bases = $(or $(call setting,$(1),train,model_name_or_path),$(call setting,$(1),chat,model_name_or_path)) $(call setting,$(1),train,adapter_name_or_path)
lineage = $(foreach base,$(notdir $(filter-out saves/$(1),$(filter saves/%,$(call bases,$(1))))),$(call lineage,$(base))) $(1)
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
ifeq ($(wildcard medasst_tools/cli.py),)
  $(error $(if $(ZH),请在项目目录下运行 make（make -C 目录）,run make in the project's folder (make -C FOLDER)))
endif
ifeq ($(shell grep -sx '  $(EXPERIMENT): *' factory_configs/experiments.yaml),)
  there := $(shell sed -n 's|^  \([a-z0-9_]*\): *$$|\1|p' factory_configs/experiments.yaml)
  $(error $(if $(ZH),factory_configs/experiments.yaml 中没有实验 '$(EXPERIMENT)'；可用的有 $(there),no experiment '$(EXPERIMENT)' in factory_configs/experiments.yaml; there are $(there)))
endif
ifeq ($(filter $(BACKEND),llamafactory api),)
  $(error $(if $(ZH),BACKEND 为 '$(BACKEND)'，应为 llamafactory 或 api,BACKEND is '$(BACKEND)', must be llamafactory or api))
endif
# a typo in a variable's name is said; what LLaMA-Factory, torchrun, uv and the hubs' clients read goes through
KNOWN := EXPERIMENT EXPERIMENTS ARGS RESTART EXTRAS DATA_ARGS SHOTS BACKEND API_BASE API_ARGS AUDIT_ARGS EXAM_ARGS SAFETY_ARGS \
  RAW EXAMS MAX_REJECTS NAMES PYTHON TRAIN_FLAGS V MEDASST
THEIRS := API_% CHAT_% CUDA_% GRADIO_% HF_% MASTER_% MEDASST_% MODELSCOPE_% N% OMP_% PIP_% RDZV_% USE_% UV_% MAX_CONCURRENT
TYPED := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
ifneq ($(filter-out $(KNOWN) $(THEIRS),$(TYPED)),)
  wrong := $(filter-out $(KNOWN) $(THEIRS),$(TYPED))
  $(error $(if $(ZH),没有 make 变量 $(wrong)；可用的有 $(KNOWN),no make variable $(wrong); there are $(KNOWN)))
endif
# ---- the verbs of an experiment, each with `then` behind it. ARGS and RESTART=1 are EXPERIMENT's: what it stands on, or is
# compared with, is trained anew only if it must be
own = $(if $(filter $(EXPERIMENT),$(1)),$(2),$(3))
tiny_qwen2_is_made = tiny-model --data-dir "$(DATA)" --out saves/tiny_qwen2 then
smollm2_135m_is_made = released-model --out saves/smollm2_135m then
trained = train factory_configs/$(1)/train.yaml $(call own,$(1),$(ARGS)) $(if $(RESTART),$(call own,$(1),--restart,--restart-if-other)) $(TRAIN_FLAGS) then
once = $(if $(1),$(firstword $(1)) $(call once,$(filter-out $(firstword $(1)),$(1))))
made = $(foreach name,$(call once,$(call lineage,$(1))),$(or $($(name)_is_made),$(if $(call setting,$(name),train,output_dir),$(call trained,$(name)))))
predicted = predict factory_configs/$(1)/predict.yaml $(if $(filter api,$(BACKEND)),--api-base $(API_BASE) $(API_ARGS)) $(call own,$(1),$(ARGS)) then
examined = exam factory_configs/$(1)/chat.yaml --exams-dir "$(EXAMS)" --out results/$(1) --shots $(SHOTS) $(EXAM_ARGS) then
scored = score results/$(1)/generated_predictions.jsonl --out results/$(1)/scores.json --per-record results/$(1)/per_record.jsonl --workers 2 then
asked_for_safety = safety factory_configs/$(1)/chat.yaml --out results/$(1) $(SAFETY_ARGS) then
evaluated = $(call made,$(1)) $(call predicted,$(1)) $(if $(shell test ! -e "$(EXAMS)" || echo there),$(call examined,$(1))) $(call scored,$(1)) $(if $(DPO),$(call asked_for_safety,$(1)))
elsewhere = $(foreach name,$(EXPERIMENTS),$(if $(filter-out $(DATA),$(call setting,$(name),predict,dataset_dir)),$(name)))

.PHONY: help setup constraints download data audit configs train predict exam score report eval model check-exams plan \
  chat chat-cli api export safety doctor test test-slow lint format screenshot \
  bench bench-data bench-score bench-train bench-predict bench-gpu bench-exam bench-lengths clean
help: ## list the targets ## 列出所有目标
	@awk -F ' ## ' '/^[a-z-]+:.* ## / {sub(/:.*/, "", $$1); printf "  make %-12s %s\n", $$1, $$$(if $(ZH),3,2)}' $(firstword $(MAKEFILE_LIST))
	@echo "  EXPERIMENT=$(EXPERIMENT), RAW=$(RAW), EXAMS=$(EXAMS), ARGS=key=value..., RESTART=1"

# ---- environment, data, configs
setup: ## install everything, pinned, into .venv, from pip's mirror if it has one (EXTRAS=gpu,qlora,distributed) ## 把固定版本的依赖装进 .venv；pip 配了镜像就用镜像（EXTRAS=gpu,qlora,distributed）
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: $(if $(ZH),PYTHON 为 '$(PYTHON)'，应为 Python 3.11 或更新版本；可试 make PYTHON=python3.12,PYTHON is '$(PYTHON)', must be Python 3.11 or newer; try make PYTHON=python3.12)" >&2; exit 2; }
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --constraint constraints.txt uv; }
	@mirror=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null || true)}}; \
	if [ ! -x $(BIN)/medasst ]; then echo "$(if $(ZH),正在安装到 .venv：5.8 GB，首次需要几分钟$${mirror:+，使用 pip 或 uv 所设的镜像},Installing into .venv: 5.8 GB, minutes the first time$${mirror:+, from the mirror that pip or uv is set to})"; \
	  if [ -t 2 ]; then (while sleep 2; do printf '\r%6s MB ' "$$(du -sm .venv | cut -f1)" >&2; done) & trap "kill $$!" EXIT; fi; fi; \
	install="$${mirror:+env UV_DEFAULT_INDEX=$$mirror} $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt"; \
	$$install -r pyproject.toml --extra dev $(patsubst %,--extra %,$(subst $(comma), ,$(EXTRAS))); \
	test -x $(BIN)/medasst || $$install --no-deps --editable .

constraints: setup ## pin every package anew into constraints.txt, for all supported Pythons ## 重新固定 constraints.txt 里的全部版本，适用于所有支持的 Python
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-emit-index-url --no-header --no-annotate pyproject.toml --output-file constraints.txt

download: setup ## fetch all corpora and exams into data/raw and data/exams (NAMES="cmtmedqa ceval medasst") ## 把全部语料和考题下载到 data/raw 和 data/exams（NAMES="cmtmedqa ceval medasst"）
	$(if $(filter file,$(origin HF_HUB_OFFLINE)),HF_HUB_OFFLINE=0) $(MEDASST) download $(NAMES)

data: configs ## convert RAW into EXPERIMENT's dataset_dir ## 把 RAW 转换成 EXPERIMENT 的 dataset_dir
	@$(MEDASST) convert --raw-dir "$(RAW)" --out-dir "$(DATA)" --max-rejects $(MAX_REJECTS) $(DATA_ARGS)

configs: setup ## render factory_configs/ from experiments.yaml and templates/ ## 由 experiments.yaml 和 templates/ 渲染 factory_configs/
	@$(MEDASST) render

audit: data ## duplicates, test questions in training, lengths, personal data (AUDIT_ARGS="--tokenizer DIR") ## 重复、训练集中的测试题、长度、个人信息（AUDIT_ARGS="--tokenizer DIR"）
	$(MEDASST) audit --data-dir "$(DATA)" --exams-dir "$(EXAMS)" $(addprefix --config ,$(wildcard $(CONFIGS)/train.yaml)) $(AUDIT_ARGS)

# ---- training and evaluation
# NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID... reach llamafactory-cli as they are: docs/distributed.md
train: $(if $(wildcard $(CONFIGS)/train.yaml),data,configs) ## train EXPERIMENT through llamafactory-cli; a killed run goes on (RESTART=1: anew) ## 用 llamafactory-cli 训练 EXPERIMENT；中断后接着训练（RESTART=1：重新训练）
	@$(MEDASST) $(or $(strip $(call made,$(EXPERIMENT))),$(call trained,$(EXPERIMENT)))

# a model that is there is used as it is: it needs neither corpora nor training
model: configs
	@$(if $(filter smollm2_135m,$(call lineage,$(EXPERIMENT))),$(MEDASST) $(smollm2_135m_is_made))
	@if [ -f $(CONFIGS)/train.yaml ] && [ ! -f $(SAVES)/run.json ] && { [ -f $(SAVES)/run.started.json ] || [ ! -f $(SAVES)/adapter_config.json ]; }; then $(MAKE) train; fi

predict: $(if $(filter api,$(BACKEND)),configs,model) ## answer the dialogue test set (BACKEND=api API_BASE=URL: through an endpoint) ## 回答对话测试集（BACKEND=api API_BASE=URL：通过服务端）
	@if [ -d "$(RAW)" ] || [ ! -e "$(DATA)/dataset_info.json" ]; then $(MAKE) data; fi
	@$(MEDASST) $(call predicted,$(EXPERIMENT))

exam: model ## answer the exam questions (SHOTS=0 or 5) ## 回答考题（SHOTS=0 或 5）
	@$(MEDASST) $(call examined,$(EXPERIMENT))

score: setup
	@$(MEDASST) $(call scored,$(EXPERIMENT))

report: setup ## write results/report.md, report_zh.md and report.html ## 生成 results/report.md、report_zh.md 和 report.html
	@$(MEDASST) report

eval: TRAIN_FLAGS = --more-samples-will-do
eval: plan data check-exams ## everything, from installation to report (EXPERIMENTS="demo_base demo") ## 从安装到报告的全部步骤（EXPERIMENTS="demo_base demo"）
	@$(foreach name,$(elsewhere),$(MAKE) eval EXPERIMENT=$(name) EXPERIMENTS=$(name) ARGS= &&) true
	@$(MEDASST) $(foreach name,$(filter-out $(elsewhere),$(EXPERIMENTS)),$(call evaluated,$(name))) report
	@$(if $(DPO),$(MEDASST) compare $(addprefix results/,$(EXPERIMENTS)))
	@echo "$(if $(ZH),接下来：make chat、make api（EXPERIMENT=$(EXPERIMENT)）；真正的模型：make doctor EXPERIMENT=medasst,Next: make chat, make api (EXPERIMENT=$(EXPERIMENT)); a real model: make doctor EXPERIMENT=medasst)"

MINUTES := $(if $(DPO),13,five)
PLAN = $(if $(filter demo%,$(EXPERIMENT)),About $(MINUTES) minutes on two cores.,How long: make doctor EXPERIMENT=$(EXPERIMENT).) Logs: saves/*/train.log and results/*/*.log; V=1 shows them as they come.
PLAN_ZH = $(if $(filter demo%,$(EXPERIMENT)),两个核心约 $(MINUTES:five=5) 分钟。,需要多久：make doctor EXPERIMENT=$(EXPERIMENT)。)日志：saves/*/train.log 和 results/*/*.log；V=1 直接显示。
plan: setup
	@echo "$(if $(ZH),make eval：数据，$(EXPERIMENTS) 的训练、预测、考试、评分，最后是报告。,make eval: data$(comma) then training$(comma) predictions$(comma) exams and scores of $(EXPERIMENTS)$(comma) then the report.)"
	@echo "$(if $(ZH),$(PLAN_ZH),$(PLAN))"

# before the training, not hours later; without exams the report says "not run"
check-exams: setup
	@if [ -e "$(EXAMS)" ]; then $(MEDASST) exam $(CONFIGS)/chat.yaml --exams-dir "$(EXAMS)" --out $(RESULTS) --check; \
	else echo "$(if $(ZH),$(EXAMS) 中没有考题：不考试；make download NAMES=\"ceval cmmlu\" 会下载,no exams in $(EXAMS): not run; make download NAMES=\"ceval cmmlu\" fetches them)"; fi

# ---- in use
chat: model ## the chat page on http://127.0.0.1:7860 (GRADIO_SERVER_PORT) ## 聊天页面 http://127.0.0.1:7860（GRADIO_SERVER_PORT）
	@$(MEDASST) chat $(CONFIGS)/chat.yaml $(ARGS)

chat-cli: model ## the same in the terminal ## 在终端里聊天
	@$(MEDASST) chat --terminal $(CONFIGS)/chat.yaml $(ARGS)

api: model ## an OpenAI-style server on http://127.0.0.1:8000/v1 (API_PORT, API_KEY, API_HOST) ## OpenAI 风格的服务 http://127.0.0.1:8000/v1（API_PORT、API_KEY、API_HOST）
	@$(MEDASST) api $(CONFIGS)/chat.yaml $(API_ARGS) $(ARGS)

export: model ## the adapter merged into its base, with a model card: saves/EXPERIMENT_merged ## 把适配器合并进基座，附模型卡：saves/EXPERIMENT_merged
	@$(MEDASST) export $(CONFIGS)/export.yaml $(ARGS)

safety: model ## what the model says to red flags, false premises... (SAFETY_ARGS="--set FILE") ## 模型如何回答危险信号、错误前提等问题（SAFETY_ARGS="--set FILE"）
	@$(MEDASST) $(call asked_for_safety,$(EXPERIMENT))

doctor: setup ## what this machine has and EXPERIMENT needs: versions, data, model, memory, disk, hours ## 本机有什么、EXPERIMENT 需要什么：版本、数据、模型、显存、磁盘、时间
	@$(MEDASST) doctor $(EXPERIMENT)

# ---- the project itself
test: setup ## every test ## 全部测试
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-slow: setup ## the long forms: ten kills of `make train`, two machines, a worker that dies ## 长测试：把 `make train` 终止十次、两台机器、工作进程意外退出
	$(BIN)/pytest -m slow $(ARGS)

lint: setup ## check style and that the rendered configs are what experiments.yaml says ## 检查代码风格，以及渲染的配置是否与 experiments.yaml 一致
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(MEDASST) render --check

format: setup ## fix style ## 修正代码风格
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

screenshot: model ## docs/chat.png anew: the chat page of the demo, in chromium ## 重新生成 docs/chat.png：chromium 中的 demo 聊天页面
	$(BIN)/python tests/chat_browser.py --out docs/chat.png

bench: setup ## time and memory of each step of `make eval` (ARGS="--with-setup RAW=... EXAMS=...") ## `make eval` 每一步的时间和内存（ARGS="--with-setup RAW=... EXAMS=..."）
	$(BIN)/python benchmarks/bench_steps.py $(ARGS)

bench-data bench-score bench-train bench-predict bench-gpu: setup # against what one would use instead: docs/benchmarks.md
	$(BIN)/python benchmarks/$(subst -,_,$@).py $(ARGS)

bench-exam: export # lm-eval's answers beside ours; make setup EXTRAS=readers
	$(BIN)/python benchmarks/bench_exam.py $(CONFIGS)/chat.yaml --exported saves/$(EXPERIMENT)_merged --exams-dir "$(EXAMS)"

bench-lengths: setup # records in Qwen2's own tokens; make setup EXTRAS=real
	$(BIN)/python benchmarks/bench_lengths.py --raw-dir "$(RAW)"

clean: ## remove what the demo made; no other model, no other result ## 删除 demo 生成的内容；不动其他模型和结果
	rm -rf data/demo $(foreach name,demo demo_base demo_dpo demo_merged tiny_qwen2,saves/$(name) saves/.$(name).lock results/$(name))
