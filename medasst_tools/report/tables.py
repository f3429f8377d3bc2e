"""Put everything in results/ beside the paper's tables.

Run: `medasst report [EXPERIMENT...] [--lang zh]`; it writes results/report.md, results/report.html (the same in one file
that opens offline) and results/figures/.

Every number is read from a file that a step wrote, or from dataset_info/paper.yaml; what isn't there is "not run".
"""

import argparse
import base64
import hashlib
import heapq
import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.errors import UserError
from medasst_tools.evaluation.compare import compare_folders, verdict
from medasst_tools.evaluation.score import load_test_sets
from medasst_tools.files import PROJECT_ROOT, read_jsonl, write_text
from medasst_tools.report.figures import draw_all, read_losses
from medasst_tools.run_manifest import check_model

PAPER = PROJECT_ROOT / "dataset_info" / "paper.yaml"
EXAM_PROTOCOL = PROJECT_ROOT / "dataset_info" / "exams.yaml"
NOT_RUN = {"en": "not run", "zh": "未运行"}
EXAMS = ("cmmlu", "ceval", "average")
METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "datasets", "medasst-tools")
SHOWN_ANSWERS = 3  # best, and as many worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="default: every folder in the results folder"
    )
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="the report's language (en)")
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
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    protocol = yaml.safe_load(EXAM_PROTOCOL.read_text(encoding="utf-8"))
    results = {name: read_experiment(name, args) for name in names}
    models = {numbers["experiment"]: model for model, numbers in paper["models"].items()}
    figures = draw_all(
        results,
        {name: models.get(name, name) for name in names},
        {
            f"{benchmark}/{subject}": entry["name"]
            for benchmark, facts in protocol["benchmarks"].items()
            for subject, entry in facts["subjects"].items()
        },
        args.results_dir / "figures",
        args.lang,
    )
    comparisons = compare_with_bases(results, args.results_dir)
    page = render_markdown(paper, results, comparisons, figures, args.lang)
    write_text(args.results_dir / "report.md", page)
    write_text(args.results_dir / "report.html", render_html(page, args.results_dir, args.lang))
    print(f"{args.results_dir / 'report.md'}, report.html: {', '.join(names) or 'no experiment run yet'}")


def read_experiment(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the steps wrote about one experiment; a missing file is None or empty."""
    results, saves, configs = args.results_dir / name, args.saves_dir / name, args.configs_dir / name
    data_dir = _read_yaml(configs / "predict.yaml").get("dataset_dir")
    chat = _read_yaml(configs / "chat.yaml")
    for config in (configs / "predict.yaml", configs / "chat.yaml"):
        check_model(_read_yaml(config), config, hash_base=False)
    manifest = read_json(Path(data_dir) / "manifest.json") if data_dir else None
    exam_rows = results / "exam.jsonl"
    return {
        "scores": read_json(results / "scores.json"),
        "exam": read_json(results / "exam.json"),
        "safety": read_json(results / "safety.json"),
        "exam_rows": list(read_jsonl(exam_rows)) if exam_rows.is_file() else [],
        "run": read_json(saves / "run.json"),
        "losses": read_losses(saves / "trainer_log.jsonl"),
        "base": (chat.get("model_name_or_path"), "adapter_name_or_path" in chat),
        "data_dir": data_dir,
        "manifest": manifest["datasets"] if manifest else None,
        "audit": read_json(Path(data_dir) / "audit.json") if data_dir else None,
        "answers": best_and_worst(results, configs / "predict.yaml"),
        "answers_sha256": (read_json(results / "scores.json") or {}).get("predictions", {}).get("sha256"),
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a step's JSON file, None if it isn't there; UserError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the step that writes it again") from None


def best_and_worst(results: Path, predict_config: Path) -> dict[str, list[dict[str, Any]]]:
    """Return {"best": ..., "worst": ...}: the records with the highest and lowest mean of the four metrics."""
    predictions, scores = results / "generated_predictions.jsonl", results / "per_record.jsonl"
    if not (predictions.is_file() and scores.is_file()):
        return {}
    means = [(sum(row[metric] for metric in METRICS) / len(METRICS), -at) for at, row in enumerate(read_jsonl(scores))]
    places = {"best": heapq.nlargest(SHOWN_ANSWERS, means), "worst": heapq.nsmallest(SHOWN_ANSWERS, means)}
    wanted = {-at: mean for chosen in places.values() for mean, at in chosen}
    records = {at: record | {"mean": wanted[at]} for at, record in enumerate(read_jsonl(predictions)) if at in wanted}
    for at, question in _questions(predict_config, set(wanted)).items():
        records[at]["question"] = question
    return {kind: [records[-at] for _, at in chosen if -at in records] for kind, chosen in places.items()}


def _questions(predict_config: Path, wanted: set[int]) -> dict[int, str]:
    """Return the test sets' questions at these places; none if the test sets aren't there any more."""
    try:
        files = load_test_sets(predict_config).values()
        rows = (row for path in files for row in read_jsonl(path))
        return {at: row["instruction"] for at, row in enumerate(rows) if at in wanted}
    except (UserError, FileNotFoundError):
        return {}


def compare_with_bases(results: dict[str, dict[str, Any]], results_dir: Path) -> list[dict[str, Any]]:
    """Compare each tuned experiment with the untuned one of the same base model, where both have run."""
    comparisons = []
    for tuned, result in results.items():
        for base, other in results.items():
            if result["base"][1] and other["base"] == (result["base"][0], False):
                try:
                    outcome = compare_folders(results_dir / tuned, results_dir / base)
                except UserError as error:
                    outcome = {"error": str(error)}
                comparisons.append({"a": tuned, "b": base} | outcome)
    return comparisons


def render_markdown(paper, results, comparisons, figures: dict[str, Path], lang: str) -> str:
    """Return the page as Markdown."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROJECT_ROOT / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": table_cell, "thousands": "{:,}".format, "short_sha": short_sha}
    return environment.get_template("report.md.j2").render(
        paper=paper,
        lang=lang,
        say=lambda english, chinese: chinese if lang == "zh" else english,
        not_run=NOT_RUN[lang],
        table_1=count_rows(paper, results, lang),
        table_2=score_rows(paper, results, "exam", EXAMS, lang),
        table_3=score_rows(paper, results, "scores", METRICS, lang),
        results=results,
        comparisons=comparisons,
        verdict=verdict,
        metrics=METRICS,
        figures={name: f"figures/{path.name}" for name, path in figures.items()},
        versions={name: metadata.version(name) for name in PACKAGES},
        commit=commit(),
    )


def render_html(page: str, folder: Path, lang: str) -> str:
    """Return the Markdown page as one HTML file: style and figures inside, nothing fetched, no script."""
    import jinja2
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(page)

    def inline(image: re.Match) -> str:
        data = base64.b64encode((folder / image[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(figures/[a-z0-9_]+\.png)"', inline, body)
    template = (PROJECT_ROOT / "templates" / "report.html.j2").read_text(encoding="utf-8")
    title = re.search(r"^# (.*)$", page, re.MULTILINE)[1]
    return jinja2.Template(template, undefined=jinja2.StrictUndefined).render(
        lang={"en": "en", "zh": "zh-CN"}[lang], title=title, body=body
    )


def table_cell(text: str, length: int = 160) -> str:
    """Return a model's text as it can stand in a table: one line, nothing that Markdown or HTML would read as its own."""
    line = " ".join(text.split())
    line = line[:length] + ("…" if len(line) > length else "")
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in "\\`*_{}[]()#+!|~" else character for character in escaped)


def short_sha(value: Any) -> str:
    """Return eight digits of a sha256, of the value's JSON if it isn't one yet."""
    if not isinstance(value, str):
        value = hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return value[:8]


def count_rows(paper: dict[str, Any], results: dict[str, dict[str, Any]], lang: str) -> dict[str, list[list[str]]]:
    """Return Table 1 for each converted folder: {folder: rows of source, paper, ours, difference, rejected}."""
    sources = [(name, entry["paper"], entry["datasets"]) for name, entry in paper["table_1"].items()]
    total = {"en": "total", "zh": "合计"}[lang]
    sources.append((total, sum(entry[1] for entry in sources), [name for entry in sources for name in entry[2]]))
    test = {"en": "test dialogues", "zh": "测试对话"}[lang]
    sources.append((test, paper["table_1_test"]["paper"], paper["table_1_test"]["datasets"]))
    manifests = {result["data_dir"]: result["manifest"] for result in results.values() if result["data_dir"]}
    return {
        folder: [_count_row(*source, manifest or {}, lang) for source in sources]
        for folder, manifest in (manifests or {NOT_RUN[lang]: None}).items()
    }


def _count_row(name: str, published: int, datasets: list[str], manifest: dict[str, Any], lang: str) -> list[str]:
    there = [manifest[dataset] for dataset in datasets if dataset in manifest]
    if not there:
        return [name, f"{published:,}", NOT_RUN[lang], "", ""]
    kept, rejected = sum(entry["kept"] for entry in there), sum(sum(entry["rejected"].values()) for entry in there)
    return [name, f"{published:,}", f"{kept:,}", f"{kept - published:+,}", f"{rejected:,}"]


def score_rows(
    paper: dict[str, Any], results: dict[str, dict[str, Any]], file: str, columns: tuple[str, ...], lang: str
) -> list[list[str]]:
    """Return the rows of Table 2 or 3: each of the paper's models, then our run of it; then our other experiments."""
    by, of_ours = {"en": ("paper", "ours"), "zh": ("论文", "我们")}[lang]
    rows, shown = [], set()
    for model, numbers in paper["models"].items():
        experiment = numbers["experiment"]
        shown.add(experiment)
        rows.append([f"{model}, {by}", "", *(f"{numbers[column]:.2f}" for column in columns)])
        scores = results.get(experiment, {}).get(file)
        rows.append(_our_row(f"{model}, {of_ours} (`{experiment}`)", scores, columns, numbers, lang))
    for name, result in results.items():
        if name not in shown:
            rows.append(_our_row(f"`{name}`", result[file], columns, None, lang))
    return rows


def _our_row(
    name: str, scores: dict[str, Any] | None, columns: tuple[str, ...], paper: dict[str, float] | None, lang: str
) -> list[str]:
    if scores is None:
        return [name, "", *[NOT_RUN[lang]] * len(columns)]
    cells = []
    for column in columns:
        low, high = scores["ci95"][column]
        difference = f" ({scores[column] - paper[column]:+.2f})" if paper else ""
        cells.append(f"{scores[column]:.2f}{difference} [{low:.2f}, {high:.2f}]")
    return [name, f"{scores['n']:,}", *cells]


def commit() -> str:
    """Return the checkout's commit, "-dirty" with changes; "not a checkout" where git knows none."""
    described = subprocess.run(
        ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "not a checkout"
