"""What the steps left of each experiment, and whether it still belongs together: what is stale is named, never shown as a number."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from medasst_tools import provenance
from medasst_tools.config import load, read_yaml
from medasst_tools.errors import UserError
from medasst_tools.evaluation.compare import check_scores
from medasst_tools.evaluation.score import metric_names
from medasst_tools.files import read_json, read_jsonl
from medasst_tools.report.figures import read_losses

SHOWN_ANSWERS = 3  # best, and as many worst


def read_experiment(name: str, results: Path, saves: Path, configs: Path) -> dict[str, Any]:
    """Return what the steps wrote in an experiment's folders; a missing file is None or empty, a stale one is in `stale` instead."""
    found = {kind: read_json(results / f"{kind}.json") for kind in ("scores", "exam", "safety")}
    stale = dict(why_stale(name, found, results, configs))
    found |= dict.fromkeys(stale)
    config = _config(configs / "predict.yaml", "predict")
    train = read_yaml(configs / "train.yaml") if (configs / "train.yaml").is_file() else {}
    data_dir = config.get("dataset_dir")
    run = provenance.read_run(saves)
    scored, examined = ((found[kind] or {}).get("made_of") for kind in ("scores", "exam"))
    answers = best_and_worst(results, configs / "predict.yaml", found["scores"]) if found["scores"] else {}
    return found | {
        "shown": provenance.shown_name(
            name, configs.parent, train=run and run["made_of"], predict=scored, exam=examined
        ),
        "stale": stale,
        "exam_rows": list(read_jsonl(results / "exam.jsonl")) if found["exam"] else [],
        "run": run,
        "losses": read_losses(saves),
        "base": (config.get("model_name_or_path"), "adapter_name_or_path" in config),
        "data_dir": data_dir,
        "manifest": (read_json(Path(data_dir) / "manifest.json") or {}).get("datasets") if data_dir else None,
        "audit": read_json(Path(data_dir) / "audit.json") if data_dir else None,
        "datasets": provenance.dataset_names(train["dataset"]) if train.get("dataset") else [],
        "answers": answers,
    }


def _config(path: Path, kind: str) -> dict[str, Any]:
    return load(path, kind=kind) if path.is_file() else {}


def why_stale(
    name: str, found: dict[str, dict[str, Any] | None], results: Path, configs: Path
) -> Iterator[tuple[str, str]]:
    """Yield (result, reason with the command that renews it) for what no longer belongs to the model, data or answers that are here."""
    now = {kind: identity_here(_config(configs / f"{kind}.yaml", kind)) for kind in ("predict", "chat")}
    for kind, config, command in (
        ("scores", "predict", "predict score"),
        ("exam", "chat", "exam"),
        ("safety", "chat", "safety"),
    ):
        if (result := found[kind]) is None:
            continue
        about = result.get("made_of") or {}
        if about.get("model") and now[config] and about["model"] != now[config]:
            what = "; ".join(provenance.differences({"model": about["model"]}, {"model": now[config]}))
            yield kind, f"of another model than is here ({what}): `make {command} EXPERIMENT={name}`"
        elif kind == "scores" and (reason := _why_scores_are_stale(name, about, results, configs)):
            yield kind, reason
        elif changed := list(provenance.changed_outputs(results / f"{kind}.json", result)):
            yield kind, f"{changed[0]} was changed since: `make {command.split()[-1]} EXPERIMENT={name}`"


def identity_here(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the identity of a config's model if its trained part, or a base folder, is on this machine; else None."""
    if not config:
        return None
    folder = provenance.trained_folder(config) or Path(str(config["model_name_or_path"]))
    return provenance.model_identity(config) if folder.is_dir() else None


def _why_scores_are_stale(name: str, about: dict[str, Any], results: Path, configs: Path) -> str | None:
    try:
        check_scores(results)
    except UserError as error:
        return str(error)
    if not about.get("model"):
        return None  # predicted by llamafactory-cli: nobody knows of which data
    config = _config(configs / "predict.yaml", "predict")
    try:
        here = provenance.data_hashes(config, "eval_dataset") if config else {}
    except UserError:
        return None  # the data isn't on this machine
    others = [dataset for dataset in here if about["files"].get(dataset, here[dataset]) != here[dataset]]
    return (
        f"the test set {others[0]} was converted anew since: `make predict score EXPERIMENT={name}`"
        if others
        else None
    )


def best_and_worst(results: Path, predict_config: Path, scores: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return {"best": ..., "worst": ...}: the records with the highest and lowest mean of the metrics, no record in both."""
    rows, names = read_jsonl(results / "per_record.jsonl"), metric_names()
    means = sorted((sum(row[name] for name in names) / len(names), -at) for at, row in enumerate(rows))
    each = min(SHOWN_ANSWERS, len(means) // 2)
    places = {"best": means[::-1][: each or len(means)], "worst": means[:each]}
    wanted = {-at: mean for chosen in places.values() for mean, at in chosen}
    predictions = read_jsonl(results / "generated_predictions.jsonl") if wanted else []
    records = {
        at: row | {"mean": wanted[at], "question": row["prompt"], "history": []}
        for at, row in enumerate(predictions)
        if at in wanted
    }
    sizes = {name: row["n"] for name, row in scores.get("by_dataset", {}).items()}
    for at, question in _questions(_config(predict_config, "predict"), set(wanted), sizes).items():
        records[at] |= question
    return {kind: [records[-at] for _, at in chosen if -at in records] for kind, chosen in places.items()}


def _questions(config: dict[str, Any], wanted: set[int], sizes: dict[str, int]) -> dict[int, dict[str, Any]]:
    """Return the test sets' questions, with their histories, at these places; none if the test sets aren't there any more.

    sizes: how many records of each were asked.
    """
    try:
        sets = provenance.dataset_files(Path(config["dataset_dir"]), config["eval_dataset"])
        rows = (row for name, size in sizes.items() for row in islice(read_jsonl(sets[name]), size))
        return {
            at: {"question": row["instruction"], "history": row.get("history") or []}
            for at, row in enumerate(rows)
            if at in wanted and "instruction" in row
        }
    except (UserError, KeyError, FileNotFoundError):
        return {}
