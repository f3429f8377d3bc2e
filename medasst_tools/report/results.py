"""What the steps left of each experiment, and whether it still belongs together: what is stale is named, never shown as a number."""

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from medasst_tools import provenance
from medasst_tools.config import load, read_yaml
from medasst_tools.errors import UserError
from medasst_tools.evaluation.compare import check
from medasst_tools.evaluation.score import metric_names
from medasst_tools.files import read_json, read_jsonl
from medasst_tools.report.figures import read_losses

SHOWN_ANSWERS = 3  # best, and as many worst


def read_experiment(name: str, results: Path, saves: Path, configs: Path) -> dict[str, Any]:
    """Return what the steps wrote in an experiment's folders; a missing file is None or empty, a stale one is in `stale` instead."""
    predict, chat = (_config(configs / f"{kind}.yaml") for kind in ("predict", "chat"))
    train = read_yaml(configs / "train.yaml") if (configs / "train.yaml").is_file() else {}
    found = {kind: read_json(results / f"{kind}.json") for kind in ("scores", "exam", "safety")}
    asked = {"scores": predict, "exam": chat, "safety": chat}
    reasons = {kind: next(why_stale(results, kind, found[kind], asked[kind]), None) for kind in found}
    stale = {kind: reason for kind, reason in reasons.items() if reason}
    found |= dict.fromkeys(stale)
    data_dir = predict.get("dataset_dir")
    run = provenance.read_run(saves)
    scored, examined = ((found[kind] or {}).get("made_of") for kind in ("scores", "exam"))
    return found | {
        "shown": provenance.shown_name(
            name, configs.parent, train=run and run["made_of"], predict=scored, exam=examined
        ),
        "stale": stale,
        "exam_rows": list(read_jsonl(results / "exam.jsonl")) if found["exam"] else [],
        "run": run,
        "losses": read_losses(saves),
        "base": (predict.get("model_name_or_path"), "adapter_name_or_path" in predict),
        "data_dir": data_dir,
        "manifest": (read_json(Path(data_dir) / "manifest.json") or {}).get("datasets") if data_dir else None,
        "audit": read_json(Path(data_dir) / "audit.json") if data_dir else None,
        "datasets": provenance.dataset_names(train["dataset"]) if train.get("dataset") else [],
        "answers": best_and_worst(results, predict, found["scores"]) if found["scores"] else {},
    }


def _config(path: Path) -> dict[str, Any]:
    return load(path, kind=path.stem) if path.is_file() else {}


def why_stale(results: Path, kind: str, found: dict[str, Any] | None, config: dict[str, Any]) -> Iterator[str]:
    """Yield why a result no longer belongs to the model, data or answers that are here, with the command that renews it."""
    if found is None:
        return
    about, here = found.get("made_of") or {}, identity_here(config)
    again = f"`make {'predict score' if kind == 'scores' else kind} EXPERIMENT={results.name}`"
    if about.get("model") and here and about["model"] != here:
        what = "; ".join(provenance.differences({"model": about["model"]}, {"model": here}))
        yield f"of another model than is here ({what}): {again}"
    try:
        check(results, kind)
    except UserError as error:
        yield str(error)
    if kind == "scores" and config and about.get("model"):  # of which data llamafactory-cli predicted nobody knows
        with contextlib.suppress(UserError):  # the data isn't on this machine
            for name, sha256 in provenance.data_hashes(config, "eval_dataset").items():
                if about["files"].get(name, sha256) != sha256:
                    yield f"the test set {name} was converted anew since: {again}"


def identity_here(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the identity of a config's model if its trained part, or a base folder, is on this machine; else None."""
    if not config:
        return None
    folder = provenance.trained_folder(config) or Path(str(config["model_name_or_path"]))
    return provenance.model_identity(config) if folder.is_dir() else None


def best_and_worst(results: Path, config: dict[str, Any], scores: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return {"best": ..., "worst": ...}: the records with the highest and lowest mean of the metrics, no record in both."""
    rows, names = read_jsonl(results / "per_record.jsonl"), metric_names()
    means = sorted((sum(row[name] for name in names) / len(names), -at) for at, row in enumerate(rows))
    each = min(SHOWN_ANSWERS, len(means) // 2)
    places = {"best": means[::-1][: each or len(means)], "worst": means[:each]}
    wanted = {-at: mean for chosen in places.values() for mean, at in chosen}
    records = {
        at: row | {"mean": wanted[at], "question": row["prompt"], "history": []}
        for at, row in enumerate(read_jsonl(results / "generated_predictions.jsonl"))
        if at in wanted
    }
    sizes = {name: row["n"] for name, row in scores.get("by_dataset", {}).items()}
    for at, question in _questions(config, set(wanted), sizes).items():
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
