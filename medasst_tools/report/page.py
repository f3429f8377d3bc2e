"""Put everything in results/ beside the paper's tables.

Run: `medasst report [EXPERIMENT...]`; it writes results/report.md, report_zh.md, report.html (both in one file that opens
offline) and results/figures/.

Every number is read from a file that a step wrote, or from dataset_info/paper.yaml; what isn't there is "not run", and
what no longer belongs to the model, data or answers that are there is "stale", with the command that renews it.
"""

import argparse
import base64
import itertools
import re
from pathlib import Path
from typing import Any

from medasst_tools import provenance
from medasst_tools.config import load, read_yaml
from medasst_tools.errors import UserError
from medasst_tools.evaluation import statistics
from medasst_tools.evaluation.compare import compare_folders, verdict
from medasst_tools.evaluation.score import interval
from medasst_tools.files import PROJECT_ROOT, write_json, write_text
from medasst_tools.machine import hardware
from medasst_tools.render import template_environment
from medasst_tools.report import tables
from medasst_tools.report.figures import draw_all
from medasst_tools.report.results import read_experiment

PAPER = PROJECT_ROOT / "dataset_info" / "paper.yaml"
EXAM_PROTOCOL = PROJECT_ROOT / "dataset_info" / "exams.yaml"
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "datasets", "medasst-tools")
RECORD = "report.json"
PAGES = {"en": "report.md", "zh": "report_zh.md"}
RESULTS, SAVES, CONFIGS = Path("results"), Path("saves"), Path("factory_configs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: every folder in results/")


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    present = sorted(path.name for path in RESULTS.glob("*/") if path.name != "figures")
    names = args.experiments or present
    if unknown := [name for name in names if not (CONFIGS / name).is_dir() and name not in present]:
        raise UserError(f"no experiment {unknown[0]!r} in {CONFIGS} or {RESULTS}")
    about = made_of(names)
    if provenance.up_to_date(RESULTS / RECORD, about):
        return
    paper, protocol = read_yaml(PAPER), read_yaml(EXAM_PROTOCOL)
    results = {name: read_experiment(name, RESULTS / name, SAVES / name, CONFIGS / name) for name in names}
    comparisons = compare_with_bases(results)
    subjects = {
        f"{benchmark}/{subject}": entry["name"]
        for benchmark, facts in protocol["benchmarks"].items()
        for subject, entry in facts["subjects"].items()
    }
    pages = {}
    for lang, file in PAGES.items():
        figures = draw_all(results, subjects, RESULTS / "figures" / lang, lang)
        shown = {name: path.relative_to(RESULTS).as_posix() for name, path in figures.items()}
        pages[lang] = render_markdown(paper, results, comparisons, shown, lang)
        write_text(RESULTS / file, _folded(pages[lang]))
    write_text(RESULTS / "report.html", render_html(pages))
    pages_written = [RESULTS / name for name in (*PAGES.values(), "report.html")]
    write_json(RESULTS / RECORD, provenance.record(RESULTS / RECORD, about, pages_written))
    for name, result in results.items():
        for kind, reason in result["stale"].items():
            print(f"stale: {name}, {kind}: {reason}")
    print(tables.printed(results) if results else "no experiment run yet")
    print(f"The report beside the paper's tables: {RESULTS}/report.html (report.md, report_zh.md)")


def made_of(names: list[str]) -> dict[str, Any]:
    """Return what the report depends on: every file that a step wrote of these experiments, their configs, the templates."""
    patterns = ((RESULTS, "*.json*"), (SAVES, "*.json*"), (CONFIGS, "*.yaml"))
    files = [path for folder, pattern in patterns for name in names for path in (folder / name).glob(pattern)]
    data = {load(path, kind="predict")["dataset_dir"] for path in files if path.name == "predict.yaml"}
    files += [path for folder in data for path in Path(folder).glob("*.json")]
    files += [PAPER, EXAM_PROTOCOL, *(PROJECT_ROOT / "templates").glob("report*")]
    code = {"medasst": provenance.code_sha256("report", "evaluation", "provenance.py"), "commit": hardware.commit()}
    hashes = {  # a project that was moved is the same
        str(path.relative_to(PROJECT_ROOT) if path.is_absolute() else path): provenance.sha256_of(path)
        for path in files
    }
    return provenance.made_of({"experiments": names}, hashes, versions=code)


def compare_with_bases(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each tuned experiment with the untuned one of the same base model, where both have run and nothing is stale."""
    comparisons = []
    for (tuned, result), (base, other) in itertools.permutations(results.items(), 2):
        if result["base"][1] and other["base"] == (result["base"][0], False):
            stale = [name for name in (tuned, base) if results[name]["stale"]]
            outcome: dict[str, Any] = {"error": f"{stale[0]}: stale, see above"} if stale else {}
            try:
                outcome = outcome or compare_folders(RESULTS / tuned, RESULTS / base)
            except UserError as error:
                outcome = {"error": str(error)}
            comparisons.append({"a": result["shown"], "b": other["shown"]} | outcome)
    return comparisons


def paper_power(paper: dict[str, Any]) -> dict[str, Any]:
    """Return what the paper's own exam differences, MedAsst against Qwen2-7B, can show whatever the pairing."""
    tuned, base = paper["models"]["MedAsst"], paper["models"]["Qwen2-7B"]
    rows = {}
    for exam, n in paper["exam_questions"].items():
        more = round(tuned[exam] * n / 100) - round(base[exam] * n / 100)
        rows[exam] = {
            "n": n,
            "more": more,
            "least_p": statistics.mcnemar(more, 0),
            "discordant": statistics.most_discordant(more),
        }
    return rows


def paper_spread(paper: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return {metric: (the paper's difference, MedAsst against Qwen2-7B; the largest spread with which it can be seen)}.

    The spread is the standard deviation of the records' differences, all of them independent, at 80 % power.
    """
    tuned, base = paper["models"]["MedAsst"], paper["models"]["Qwen2-7B"]
    widest = paper["table_1_test"]["paper"] ** 0.5 / statistics.smallest_visible(1)
    differences = {name: tuned[name] - base[name] for _, name in tables.dialogue_columns() if name in tuned}
    return {name: (difference, difference * widest) for name, difference in differences.items()}


def render_markdown(paper, results, comparisons, figures: dict[str, str], lang: str) -> str:
    """Return the page as Markdown."""
    from medasst_tools.evaluation.text_metrics import (
        PRIMARY,  # loads dictionaries, which an up-to-date report needs not
    )

    environment = template_environment(
        cell=tables.cell, thousands="{:,}".format, brief=provenance.brief, interval=interval
    )
    columns = {"exam": tables.EXAM_COLUMNS, "scores": tables.dialogue_columns()}
    score_tables = {
        kind: (tables.header(shown, lang), *tables.score_rows(paper, results, kind, shown, lang))
        for kind, shown in columns.items()
    }
    return environment.get_template("report.md.j2").render(
        paper=paper,
        lang=lang,
        say=lambda english, chinese: chinese if lang == "zh" else english,
        not_run=tables.NOT_RUN[lang],
        table_1=tables.count_rows(paper, results, lang),
        score_tables=score_tables,
        results=results,
        comparisons=comparisons,
        verdict=verdict,
        paper_power=paper_power(paper),
        paper_spread=paper_spread(paper),
        primary=PRIMARY,
        metrics=[key for _, key in columns["scores"]],
        figures=figures,
        versions=provenance.package_versions(*PACKAGES),
        commit=hardware.commit(),
    )


def render_html(pages: dict[str, str]) -> str:
    """Return the Markdown pages as one HTML file with a switch: style and figures inside, nothing fetched, no script."""
    from markdown_it import MarkdownIt

    def inline(image: re.Match) -> str:
        data = base64.b64encode((RESULTS / image[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    bodies = {
        lang: re.sub(r'src="(figures/[a-z0-9_/]+\.png)"', inline, _folded(reader.render(page)))
        for lang, page in pages.items()
    }
    title = pages["en"].partition("\n")[0].removeprefix("# ")
    return template_environment().get_template("report.html.j2").render(title=title, bodies=bodies)


FOLD = re.compile(r"^(<p>)?\[fold: (.*?)\](</p>)?$", re.MULTILINE)
END = re.compile(r"^(<p>)?\[end\](</p>)?$", re.MULTILINE)


def _folded(text: str) -> str:
    """Turn the marks [fold: title] and [end], a line each, into what folds in a browser and on a forge's page.

    They are marks until then because raw HTML in Markdown is left off on purpose: answers stay text.
    """
    return END.sub("</details>", FOLD.sub(r"<details><summary>\2</summary>", text))
