"""The cost formulas against what they stand for: transformers' parameters, torch's operation counter, and tensors counted as they come and go."""

import json
import weakref

import pytest
import yaml

from medasst_tools.machine import cost as training_cost
from medasst_tools.machine.cost import Method, ModelShape
from medasst_tools.training.tiny_model import build_tiny_model

BASES = [base for base in yaml.safe_load(training_cost.BASE_MODELS.read_text(encoding="utf-8")) if "config" in base]
QWEN2_7B = BASES[0]["config"]


def meta_model(config: dict):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["ids"][0])
def test_parameters_are_transformers_own(base):
    model = meta_model(base["config"])
    shape = ModelShape.from_config(base["config"])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    # and the whole config.json, with all that it says besides, gives the same shape
    assert ModelShape.from_config(json.loads(model.config.to_json_string(use_diff=False))) == shape


def test_qwen2_7b_is_what_its_card_says():
    shape = ModelShape.from_config(QWEN2_7B)
    assert shape.parameters == 7_615_616_512
    assert shape.lora_parameters(8) == 20_185_088


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B-Base", "google/gemma-7b-it"])
def test_lora_parameters_are_pefts_own(name):
    from peft import LoraConfig, get_peft_model

    config = training_cost.base_config(name) | {"num_hidden_layers": 2}
    model = get_peft_model(meta_model(config), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ModelShape.from_config(config).lora_parameters(8) == trainable


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "mamba"}, {"model_type": "qwen2"}, {"model_type": "qwen2", "vocab_size": "many"}]
)
def test_an_unknown_shape_is_unknown(config):
    assert ModelShape.from_config(config) is None


# ---- arithmetic and memory, in a real training through LLaMA-Factory ------------------------------------------------
class TensorMemory:
    """Bytes of all live storages that torch's operations made, and their peak. Works on fake tensors too."""

    def __new__(cls):
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Tracker(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.seen, self.now, self.peak = set(), 0, 0

            def track(self, tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in self.seen:
                    return
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)

                def gone():
                    self.seen.discard(key)
                    self.now -= size

                weakref.finalize(storage, gone)

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for leaf in tree_leaves(result):
                    if hasattr(leaf, "untyped_storage"):
                        self.track(leaf)
                return result

        return Tracker()


STEPS, BATCH, LENGTH = 2, 2, 96


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Qwen2 and records that all have LENGTH tokens after cutoff_len."""
    folder = tmp_path_factory.mktemp("cost")
    build_tiny_model(
        ["头痛两天怎么办？\n您好，建议休息，必要时就医。"] * 20, folder / "model", vocab_size=320, hidden_size=64
    )
    record = {"instruction": "头痛两天怎么办？" * 9, "input": "", "output": "您好，建议休息，必要时就医。" * 9}
    (folder / "a.jsonl").write_text((json.dumps(record, ensure_ascii=False) + "\n") * 8, encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.jsonl"}}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_operations_of_a_real_training(tiny, tmp_path, finetuning, recompute):
    """FlopCounterMode around LLaMA-Factory's own training: equal but for the rotation angles, which are no weights."""
    from llamafactory.train.tuner import run_exp
    from torch.utils.flop_counter import FlopCounterMode

    config = {
        "model_name_or_path": str(tiny / "model"), "do_train": True, "stage": "sft", "finetuning_type": finetuning,
        "dataset_dir": str(tiny), "dataset": "a", "template": "qwen", "cutoff_len": LENGTH, "output_dir": str(tmp_path),
        "per_device_train_batch_size": BATCH, "max_steps": STEPS, "use_cpu": True, "report_to": "none",
        "flash_attn": "disabled",  # the counter doesn't know the CPU's fused attention
        "disable_gradient_checkpointing": not recompute, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    if finetuning == "lora":
        config |= {"lora_rank": 8, "lora_target": "all"}
    with FlopCounterMode(display=False) as counter:
        run_exp(dict(config))
    shape = training_cost.shape_of(str(tiny / "model"))
    rotation = 2 * LENGTH * shape.head_dim // 2  # once a step, for all rows together
    tokens = STEPS * BATCH * LENGTH
    counted = counter.get_total_flops() - STEPS * rotation
    assert counted == tokens * training_cost.flops_per_token(shape, Method.from_config(config), LENGTH)


MEMORY_CASES = {  # what is changed in Qwen2-7B's shape; the method; dtype
    "medasst": ({}, {}, "bf16"),
    "deep, hardly any vocabulary": ({"vocab_size": 512, "num_hidden_layers": 8}, {}, "bf16"),
    "narrow mlp": ({"vocab_size": 512, "num_hidden_layers": 4, "intermediate_size": 9472}, {}, "bf16"),
    "kept activations": ({"vocab_size": 512, "num_hidden_layers": 6}, {"recompute": False}, "bf16"),
    "float32": ({"vocab_size": 512, "num_hidden_layers": 6}, {"mixed": False}, "fp32"),
    "float32, kept, small": (
        {"vocab_size": 4096, "num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
         "num_key_value_heads": 2},
        {"recompute": False, "mixed": False}, "fp32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory_of_a_step_on_tensors_without_data(case):
    """Two steps of LoRA on the real width, through LLaMA-Factory's own checkpointing and accelerate's mixed precision; no data, so no memory."""
    changes, settings, dtype = MEMORY_CASES[case]
    method = Method(batch=4, cutoff=512, **settings)
    shape = ModelShape.from_config(QWEN2_7B | changes)
    peak = tracked_peak(QWEN2_7B | changes, method, dtype)
    resting, working = training_cost.resting_bytes(shape, method), training_cost.working_bytes(shape, method, 4 * 512)
    # in a narrow model attention's own tensors, which the formula hasn't, count for more
    assert resting + working == pytest.approx(peak, rel=0.06 if "small" in case else 0.03)
    assert working == pytest.approx(peak - resting, rel=0.1)  # and not only because weights are most of it
    if case == "medasst":
        assert training_cost.training_bytes(shape, method, gpu=True) < 24 << 30


def tracked_peak(config: dict, method: Method, dtype: str) -> int:
    import contextlib
    from types import SimpleNamespace

    import torch
    from accelerate.utils.operations import convert_outputs_to_fp32
    from llamafactory.model.model_utils.checkpointing import prepare_model_for_training
    from peft import LoraConfig, get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # fake parameters can't be exchanged
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
        )
        model.enable_input_require_grads()
        prepare_model_for_training(
            model,
            SimpleNamespace(
                upcast_layernorm=False, disable_gradient_checkpointing=not method.recompute, use_unsloth_gc=False,
                use_reentrant_gc=True, upcast_lmhead_output=False,
            ),
        )  # fmt: skip
        model = get_peft_model(
            model, LoraConfig(r=method.lora_rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained)
        tracker = TensorMemory()
        for parameter in model.parameters():
            tracker.track(parameter)
        rows = torch.zeros((method.batch, method.cutoff), dtype=torch.long)
        mixed = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
        forward = convert_outputs_to_fp32(model.forward) if dtype == "bf16" else model.forward
        for _ in range(2):  # the optimizer's moments are there from the second on
            with tracker:
                with mixed:
                    outputs = forward(
                        input_ids=rows, labels=rows, attention_mask=torch.ones_like(rows), use_cache=False
                    )
                loss = outputs["loss"]
                del outputs
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return tracker.peak


# ---- what a config says, cards, rates -------------------------------------------------------------------------------
def test_methods_of_the_rendered_configs(tmp_path):
    medasst = yaml.safe_load((training_cost.PROJECT_ROOT / "factory_configs/medasst/train.yaml").read_text("utf-8"))
    assert Method.from_config(medasst) == Method(lora_rank=8, batch=4, cutoff=512)
    base = yaml.safe_load((training_cost.PROJECT_ROOT / "factory_configs/demo_base/train.yaml").read_text("utf-8"))
    assert Method.from_config(base) == Method(lora_rank=None, batch=8, cutoff=256, recompute=False, mixed=False)
    zero3 = medasst | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    assert Method.from_config(zero3, 8).shards == 8
    (tmp_path / "ds.json").write_text(json.dumps(zero3["deepspeed"]))
    assert Method.from_config(medasst | {"deepspeed": str(tmp_path / "ds.json")}, 8).shards == 8
    assert Method.from_config(medasst | {"deepspeed": "no/such.json"}, 8).shards == 1
    shape = ModelShape.from_config(QWEN2_7B)
    whole, quarter = (training_cost.resting_bytes(shape, Method(shards=n)) for n in (1, 4))
    assert quarter == whole / 4
    assert training_cost.resting_bytes(shape, Method(bits=4)) < 0.45 * whole


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A10", 125), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA GeForce RTX 4090", 165.2), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA L40S", 362), ("NVIDIA A10G", None), ("NVIDIA GeForce GTX 1080", None), ("", None),
    ],
)  # fmt: skip
def test_card_peaks(name, tflops):
    assert training_cost.card_peak(name) == (tflops and tflops * 1e12)


def test_rates_come_from_runs_on_the_same_hardware(tmp_path, tiny):
    hardware = {"machine": "x", "cpus": 2, "gpus": []}
    config = {"model_name_or_path": str(tiny / "model"), "per_device_train_batch_size": 2, "bf16": False}
    run = {"inputs": {"config": config}, "tokens": 1000, "training_seconds": 2.0, "steps": 5, "hardware": hardware}
    runs = {
        "good": run,
        "elsewhere": run | {"hardware": {}},
        "unmeasured": run | {"tokens": None},
        "old": {"seconds": 3},
    }
    for name, written in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(written), encoding="utf-8")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{", encoding="utf-8")
    shape = training_cost.shape_of(str(tiny / "model"))
    each = training_cost.flops_per_token(
        shape, Method.from_config(config), 100
    )  # 1,000 tokens in 5 steps of 2 records
    assert training_cost.measured_rates(tmp_path, hardware) == [("good", 500 * each, 200 * each)]
