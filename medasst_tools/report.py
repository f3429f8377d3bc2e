"""Put everything in results/ beside the paper's tables.

Run: `medasst report [EXPERIMENT...]`; it writes results/report.md and results/figures/.

Every number is read from a file that a step wrote, or from dataset_info/paper.yaml; what isn't there is "not run".
"""

import argparse
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.errors import UserError
from medasst_tools.files import PROJECT_ROOT, write_text

PAPER = PROJECT_ROOT / "dataset_info" / "paper.yaml"
TEMPLATE = "report.md.j2"
NOT_RUN = "not run"
EXAMS = ("cmmlu", "ceval", "average")
METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "datasets", "medasst-tools")
SAMPLE_ANSWERS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="default: every folder in the results folder"
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="where the steps wrote (results)")
    parser.add_argument("--saves-dir", type=Path, default=Path("saves"), help="where training wrote (saves)")
    parser.add_argument(
        "--configs-dir", type=Path, default=Path("factory_configs"), help="rendered configs (factory_configs)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    present = sorted(path.name for path in args.results_dir.glob("*/") if path.name != "figures")
    names = args.experiments or present
    if unknown := [name for name in names if not (args.configs_dir / name).is_dir() and name not in present]:
        raise UserError(f"no experiment {unknown[0]!r} in {args.configs_dir} or {args.results_dir}")
    results = {name: read_experiment(name, args) for name in names}
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    figure = draw_figure_4(paper, results, args.results_dir / "figures" / "figure4.png")
    page = render(paper, results, figure)
    write_text(args.results_dir / "report.md", page)
    print(f"{args.results_dir / 'report.md'}: {', '.join(names) or 'no experiment run yet'}")


def read_experiment(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the steps wrote about one experiment; a missing file is None."""
    results, saves = args.results_dir / name, args.saves_dir / name
    predict_config = args.configs_dir / name / "predict.yaml"
    config = yaml.safe_load(predict_config.read_text(encoding="utf-8")) if predict_config.is_file() else {}
    data_dir = config.get("dataset_dir")
    manifest = read_json(Path(data_dir) / "manifest.json") if data_dir else None
    return {
        "scores": read_json(results / "scores.json"),
        "exam": read_json(results / "exam.json"),
        "run": read_json(saves / "run.json"),
        "data_dir": data_dir,
        "manifest": manifest["datasets"] if manifest else None,
        "samples": read_samples(results / "generated_predictions.jsonl"),
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a step's JSON file, None if it isn't there; UserError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the step that writes it again") from None


def read_samples(path: Path) -> list[dict[str, str]]:
    """Return a few predictions, evenly spread over the file, so that no one picks them."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        json.loads(lines[place * len(lines) // SAMPLE_ANSWERS]) for place in range(min(SAMPLE_ANSWERS, len(lines)))
    ]


def render(paper: dict[str, Any], results: dict[str, dict[str, Any]], figure: Path | None) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROJECT_ROOT / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = table_cell
    return environment.get_template(TEMPLATE).render(
        paper=paper,
        table_1=count_rows(paper, results),
        table_2=score_rows(paper, results, "exam", EXAMS),
        table_3=score_rows(paper, results, "scores", METRICS),
        results=results,
        figure=f"figures/{figure.name}" if figure else None,
        versions={name: metadata.version(name) for name in PACKAGES},
        commit=commit(),
    )


def table_cell(text: str, length: int = 160) -> str:
    """Return a model's text as it can stand in a table: one line, nothing that Markdown or HTML would read as its own."""
    line = " ".join(text.split())
    line = line[:length] + ("…" if len(line) > length else "")
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in "\\`*_{}[]()#+!|~" else character for character in escaped)


def count_rows(paper: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Return Table 1 for each converted folder: {folder: rows of source, paper, ours, difference, rejected}."""
    tables = {}
    for result in results.values():
        if result["data_dir"] is None:
            continue
        manifest = result["manifest"] or {}
        sources = [(name, entry["paper"], entry["datasets"]) for name, entry in paper["table_1"].items()]
        total = ("total", sum(entry[1] for entry in sources), [name for entry in sources for name in entry[2]])
        test = ("test dialogues", paper["table_1_test"]["paper"], paper["table_1_test"]["datasets"])
        tables[result["data_dir"]] = [_count_row(*entry, manifest) for entry in [*sources, total, test]]
    return tables or {
        NOT_RUN: [[name, f"{entry['paper']:,}", NOT_RUN, "", ""] for name, entry in paper["table_1"].items()]
    }


def _count_row(name: str, published: int, datasets: list[str], manifest: dict[str, Any]) -> list[str]:
    there = [manifest[dataset] for dataset in datasets if dataset in manifest]
    if not there:
        return [name, f"{published:,}", NOT_RUN, "", ""]
    kept, rejected = sum(entry["kept"] for entry in there), sum(sum(entry["rejected"].values()) for entry in there)
    return [name, f"{published:,}", f"{kept:,}", f"{kept - published:+,}", f"{rejected:,}"]


def score_rows(
    paper: dict[str, Any], results: dict[str, dict[str, Any]], file: str, columns: tuple[str, ...]
) -> list[list[str]]:
    """Return the rows of Table 2 or 3: each of the paper's models, then our run of it; then our other experiments."""
    rows, shown = [], set()
    for model, numbers in paper["models"].items():
        experiment = numbers["experiment"]
        shown.add(experiment)
        rows.append([f"{model}, paper", "", *(f"{numbers[column]:.2f}" for column in columns)])
        rows.append(
            _our_row(f"{model}, ours (`{experiment}`)", results.get(experiment, {}).get(file), columns, numbers)
        )
    for name, result in results.items():
        if name not in shown:
            rows.append(_our_row(f"`{name}`", result[file], columns, None))
    return rows


def _our_row(
    name: str, scores: dict[str, Any] | None, columns: tuple[str, ...], paper: dict[str, float] | None
) -> list[str]:
    if scores is None:
        return [name, "", *[NOT_RUN] * len(columns)]
    cells = []
    for column in columns:
        low, high = scores["ci95"][column]
        difference = f" ({scores[column] - paper[column]:+.2f})" if paper else ""
        cells.append(f"{scores[column]:.2f}{difference} [{low:.2f}, {high:.2f}]")
    return [name, f"{scores['n']:,}", *cells]


def draw_figure_4(paper: dict[str, Any], results: dict[str, dict[str, Any]], path: Path) -> Path | None:
    """Draw Table 3 as the paper's Figure 4 does, bars grouped by metric, for what was run; None if nothing was."""
    models = {numbers["experiment"]: model for model, numbers in paper["models"].items()}
    ran = {models.get(name, name): result["scores"] for name, result in results.items() if result["scores"]}
    path.unlink(missing_ok=True)
    if not ran:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 0.8 / len(ran)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (name, scores) in enumerate(ran.items()):
        positions = [group + (place - (len(ran) - 1) / 2) * width for group in range(len(METRICS))]
        heights = [scores[metric] for metric in METRICS]
        errors = [[abs(scores[metric] - scores["ci95"][metric][side]) for metric in METRICS] for side in (0, 1)]
        bars = axes.bar(
            positions,
            heights,
            width * 0.92,
            yerr=errors,
            capsize=3,
            label=f"{name} (n={scores['n']:,})",
            color=f"C{place}",
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(range(len(METRICS)), [metric.upper() for metric in METRICS])
    axes.set_ylabel("score, percent (bars: mean; lines: 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return path


def commit() -> str:
    """Return the checkout's commit, "-dirty" with changes; "not a checkout" where git knows none."""
    described = subprocess.run(
        ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "not a checkout"
