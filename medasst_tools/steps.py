"""What a target of the Makefile stands for: an experiment's verbs in their order, those that it stands on first.

Run: `medasst steps eval`, which `make eval` does. The Makefile's variables come in the environment, where make puts what
its command line sets. Each verb decides by itself whether it has something to do, so that nothing here looks at files'
times; only a model that is there is used as it is, without corpora or training, by everything but `train` and `eval`.
"""

import argparse
import functools
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medasst_tools import chain, cli, render
from medasst_tools.errors import UserError
from medasst_tools.language import said

Verbs = list[list[str]]  # each the words behind `medasst`
SAMPLES, SAMPLES_DATA = "dataset_info/samples", "data/demo"
SAMPLES_REJECTS = "0.1"  # dozens of records with deliberate dirt: one bad record is more than the usual 1 %
# what lies in saves/ and no experiment trains: how it is made, given the data folder
MADE: dict[str, Callable[[str], list[str]]] = {
    "tiny_qwen2": lambda data: ["tiny-model", "--data-dir", data, "--out", "saves/tiny_qwen2"],
    "smollm2_135m": lambda data: ["released-model", "--out", "saves/smollm2_135m"],
}
BACKENDS = ("llamafactory", "api")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("target", choices=TARGETS, help="of the Makefile")


def run(args: argparse.Namespace) -> int:
    """Render the configs, then run the target's verbs until one fails; return its exit status, else 0."""
    verbs = [["render"]] + TARGETS[args.target](asked())
    once = list(dict.fromkeys(map(tuple, verbs)))  # two experiments on one base
    status = chain.run([cli.parse(list(words)) for words in once], cli.run_verb)
    if args.target == "eval" and not status:
        print(said(f"Next: make chat, make api (EXPERIMENT={asked()}); a real model: make doctor EXPERIMENT=medasst"))
    return status


# ---- what make was given ----------------------------------------------------------------------------------------------
def variable(name: str, default: str = "") -> str:
    """Return a variable of the Makefile, `default` where it is empty."""
    return os.environ.get(name, "").strip() or default


def asked() -> str:
    """Return the name of the experiment that is meant."""
    return variable("EXPERIMENT", "demo")


def options(name: str) -> list[str]:
    """Return the words of a variable that is handed on, such as ARGS; UserError if a quotation has no end."""
    try:
        return shlex.split(variable(name))
    except ValueError as error:
        raise UserError(f"{name} is {variable(name)!r}, must be words as a shell reads them: {error}") from None


def backend() -> str:
    """Return what answers the test sets; UserError if it is none that there is."""
    if (given := variable("BACKEND", BACKENDS[0])) not in BACKENDS:
        raise UserError(f"BACKEND is {given!r}, must be {' or '.join(BACKENDS)}")
    return given


def own(name: str, words: list[str]) -> list[str]:
    """Return the words for EXPERIMENT, none for what it stands on or is compared with."""
    return words if name == asked() else []


# ---- what the experiment is ---------------------------------------------------------------------------------------------
@functools.cache
def experiments() -> dict[str, Any]:
    """Return experiments.yaml."""
    return render.load_experiments(render.CONFIGS_DIR / "experiments.yaml")


@functools.cache
def experiment(name: str) -> dict[str, Any]:
    """Return an entry of experiments.yaml with what it takes over; UserError if there is none."""
    return render.resolve(experiments(), name)


def data_dir(name: str) -> str:
    """Return the folder that the experiment's records are read from."""
    return experiment(name)["dataset_dir"]


def input_dir(name: str, variable_name: str, kind: str) -> str:
    """Return the folder of the raw corpora or exams: the bundled samples' for what reads data/demo."""
    return variable(variable_name, f"{SAMPLES if data_dir(name) == SAMPLES_DATA else 'data'}/{kind}")


def has_exams(name: str) -> bool:
    """Say whether the experiment's folder of exams holds any; a download that failed leaves it empty, or a hidden folder in it."""
    return any(Path(input_dir(name, "EXAMS", "exams")).glob("[!.]*"))


def base(name: str) -> str:
    """Return the name of the experiment's base in saves/, empty if it isn't from there."""
    path = Path(experiment(name)["model"]["model_name_or_path"][0])
    return path.name if path.parent == Path("saves") else ""


def stands_on(name: str) -> list[str]:
    """Return what the experiment's model is made of in saves/: its base, and what it goes on from."""
    parts = (base(name), experiment(name).get("after"))
    return [other for other in (*MADE, *experiments()["experiments"]) if other in parts]


def is_trained(name: str) -> bool:
    """Say whether the experiment has a training, rather than a base as it is."""
    return experiment(name)["finetuning"] != "none"


def is_preference(name: str) -> bool:
    """Say whether the experiment learns which of two answers is better."""
    return experiment(name).get("method", {}).get("stage", ["sft"])[0] == "dpo"


def compared() -> list[str]:
    """Return what `make eval` evaluates: EXPERIMENTS, else EXPERIMENT beside its untuned base, or what a DPO went on from."""
    name = asked()
    beside = experiment(name).get("after") or f"{name}_base"
    return variable("EXPERIMENTS").split() or [*({beside} & experiments()["experiments"].keys()), name]


# ---- its verbs ----------------------------------------------------------------------------------------------------------
def data(name: str) -> Verbs:
    """Convert the raw corpora into the experiment's data folder."""
    raw = input_dir(name, "RAW", "raw")
    share = variable("MAX_REJECTS", SAMPLES_REJECTS if raw == f"{SAMPLES}/raw" else "0.01")
    places = ["--raw-dir", raw, "--out-dir", data_dir(name)]
    return [["convert", *places, "--max-rejects", share, *options("DATA_ARGS")]]


def audit(name: str) -> Verbs:
    """Look through the converted data, with the experiment's own tokenizer where it trains."""
    config = ["--config", f"factory_configs/{name}/train.yaml"] if is_trained(name) else []
    where = input_dir(name, "EXAMS", "exams")
    exams = ["--exams-dir", where] if has_exams(name) or variable("EXAMS") else []
    if not exams:
        print(said(f"no exams in {where}: their questions aren't looked for"), flush=True)
    return [*data(name), ["audit", "--data-dir", data_dir(name), *exams, *config, *options("AUDIT_ARGS")]]


def train(name: str, *flags: str) -> Verbs:
    """Train the experiment's model, after what it stands on."""
    return [*below(name, *flags), *training(name, *flags)]


def below(name: str, *flags: str) -> Verbs:
    """Make or train what the experiment's model stands on, oldest first."""
    below_it = (made(name) if part in MADE else train(part, *flags) for part in stands_on(name))
    return [verb for verbs in below_it for verb in verbs]


def made(name: str) -> Verbs:
    """Make the experiment's base, which no experiment trains, of the experiment's data."""
    return [*data(name), MADE[base(name)](data_dir(name))]


def training(name: str, *flags: str) -> Verbs:
    """Train, with ARGS if it is EXPERIMENT; RESTART trains what EXPERIMENT stands on anew only if it must be."""
    again = [*own(name, ["--restart"]), "--restart-if-other"][:1] if variable("RESTART") else []
    words = ["train", f"factory_configs/{name}/train.yaml", *own(name, options("ARGS")), *again, *flags]
    return [*(data(name) if is_trained(name) else []), words]  # without a training: the verb says so


def model(name: str) -> Verbs:
    """Train, unless the model is there: finished here, or an adapter brought from elsewhere."""
    folder = Path("saves", name)
    brought = (folder / "adapter_config.json").is_file() and not (folder / "run.started.json").is_file()
    if not is_trained(name):
        return below(name)
    if not brought and not (folder / "run.json").is_file():
        return train(name)
    return made(name) if base(name) in MADE and not Path("saves", base(name)).is_dir() else []


def answers(name: str) -> Verbs:
    """Answer the test sets."""
    endpoint = ["--api-base", variable("API_BASE", "http://127.0.0.1:8000/v1"), *options("API_ARGS")]
    through = endpoint if backend() == "api" else []
    return [["predict", f"factory_configs/{name}/predict.yaml", *through, *own(name, options("ARGS"))]]


def predict(name: str) -> Verbs:
    """Answer the test sets, which are converted if there is something to convert."""
    there = Path(data_dir(name), "dataset_info.json").exists() and not Path(input_dir(name, "RAW", "raw")).is_dir()
    return [*(model(name) if backend() != "api" else []), *([] if there else data(name)), *answers(name)]


def questions(name: str, *more: str) -> Verbs:
    """Answer the exams."""
    places = ["--exams-dir", input_dir(name, "EXAMS", "exams"), "--out", f"results/{name}"]
    shots = ["--shots", variable("SHOTS", "0")]
    return [["exam", f"factory_configs/{name}/chat.yaml", *places, *shots, *options("EXAM_ARGS"), *more]]


def safety_questions(name: str) -> Verbs:
    """Answer the safety set."""
    return [["safety", f"factory_configs/{name}/chat.yaml", "--out", f"results/{name}", *options("SAFETY_ARGS")]]


def score(name: str) -> Verbs:
    """Score the answers that are there."""
    folder = f"results/{name}"
    out = ["--out", f"{folder}/scores.json", "--per-record", f"{folder}/per_record.jsonl"]
    return [["score", f"{folder}/generated_predictions.jsonl", *out, "--workers", "2"]]


def export(name: str) -> Verbs:
    """Merge the adapter into its base."""
    return [["export", f"factory_configs/{name}/export.yaml", *own(name, options("ARGS"))]]


def evaluate(name: str) -> Verbs:
    """From raw corpora to the report, for each of the experiments that are compared; exams are looked at before the training."""
    names = compared()
    exams = {one: has_exams(one) for one in names}
    show_plan(name, names, exams)
    verbs = [verb for one in names for verb in data(one)]
    verbs += [verb for one in names if exams[one] for verb in questions(one, "--check")][-1:]
    for one in names:
        verbs += [*(train(one, "--more-samples-will-do") if is_trained(one) else below(one)), *answers(one)]
        verbs += [*(questions(one) if exams[one] else []), *score(one)]
        verbs += safety_questions(one) if is_preference(name) else []
        # released weights: what others would load belongs to it
        verbs += export(one) if base(one) == "smollm2_135m" and is_trained(one) else []
    verbs += [["report"]]
    return verbs + ([["compare", *(f"results/{one}" for one in names)]] if is_preference(name) else [])


def show_plan(name: str, names: list[str], exams: dict[str, bool]) -> None:
    """Say what will be done, how long it takes, and where the logs are."""
    listed = " ".join(names)
    print(said(f"make eval: data, then training, predictions, exams and scores of {listed}, then the report."))
    if name.startswith("demo"):
        print(said(f"About {13 if is_preference(name) else 5} minutes on two cores."))
    else:
        print(said(f"How long: make doctor EXPERIMENT={name}."))
    print(said("Logs: saves/*/train.log and results/*/*.log; V=1 shows them as they come."), flush=True)
    for where in {input_dir(one, "EXAMS", "exams") for one in names if not exams[one]}:
        print(said(f'no exams in {where}: not run; make download NAMES="ceval cmmlu" fetches them'), flush=True)


TARGETS: dict[str, Callable[[str], Verbs]] = {
    "data": data,
    "audit": audit,
    "train": train,
    "model": model,
    "predict": predict,
    "exam": lambda name: [*model(name), *questions(name)],
    "score": score,
    "safety": lambda name: [*model(name), *safety_questions(name)],
    "export": lambda name: [*model(name), *export(name)],
    "eval": evaluate,
}
