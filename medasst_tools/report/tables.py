"""The report's tables as rows of text; a column is a line of one of the lists below."""

import html
import re
from typing import Any

from medasst_tools.evaluation.score import interval, metric_names

NOT_RUN = {"en": "not run", "zh": "未运行"}
STALE = {"en": "stale", "zh": "已过期"}
# (header, key in exam.json); the dialogue table's columns are the metrics
EXAM_COLUMNS = [("CMMLU", "cmmlu"), ("C-Eval", "ceval"), ({"en": "average", "zh": "平均"}, "average")]


def dialogue_columns() -> list[tuple[Any, str]]:
    """Return (header, key in scores.json) of Table 3."""
    return [(name.upper(), name) for name in metric_names()]


def header(columns: list[tuple[Any, str]], lang: str) -> list[str]:
    """Return a table's header in a language."""
    return [title[lang] if isinstance(title, dict) else title for title, _ in columns]


def count_rows(paper: dict[str, Any], results: dict[str, dict[str, Any]], lang: str) -> dict[str, list[list[str]]]:
    """Return Table 1 for each converted folder: {folder: rows of source, paper, ours, difference, rejected}.

    A folder that holds the paper's corpora only as samples has no difference. Every dataset that is trained on has a row.
    """
    sources = [(name, entry["paper"], entry["datasets"]) for name, entry in paper["table_1"].items()]
    of_paper = {name for _, _, names in sources for name in names}
    total = {"en": "total", "zh": "合计"}[lang]
    test = {"en": "test dialogues", "zh": "测试对话"}[lang]
    tests = (test, paper["table_1_test"]["paper"], paper["table_1_test"]["datasets"])
    tables = {}
    for folder in dict.fromkeys(result["data_dir"] for result in results.values() if result["data_dir"]):
        here = [result for result in results.values() if result["data_dir"] == folder]
        manifest = here[0]["manifest"] or {}
        trained_on = dict.fromkeys(name for result in here for name in result["datasets"])
        own = [(name, None, [name]) for name in trained_on if name not in of_paper and name in manifest]
        rows = [*sources, *own]
        summed = (total, sum(row[1] for row in sources), [name for row in rows for name in row[2]])
        tables[folder] = [_count_row(*row, manifest, folder != "data/demo", lang) for row in [*rows, summed, tests]]
    return tables or {NOT_RUN[lang]: [_count_row(*row, {}, True, lang) for row in [*sources, tests]]}


def _count_row(
    name: str, published: int | None, datasets: list[str], manifest: dict[str, Any], compared: bool, lang: str
) -> list[str]:
    there = [manifest[dataset] for dataset in datasets if dataset in manifest]
    paper = "" if published is None else f"{published:,}"
    if not there:
        return [name, paper, NOT_RUN[lang], "", ""]
    kept, rejected = sum(entry["kept"] for entry in there), sum(sum(entry["rejected"].values()) for entry in there)
    difference = f"{kept - published:+,}" if compared and published is not None else ""
    return [name, paper, f"{kept:,}", difference, f"{rejected:,}"]


def score_rows(
    paper: dict[str, Any], results: dict[str, dict[str, Any]], kind: str, columns: list[tuple[Any, str]], lang: str
) -> tuple[list[list[str]], list[str]]:
    """Return the rows of Table 2 or 3, and the names of what isn't run: the paper's models with our runs of them, then ours.

    kind: "exam" or "scores".
    """
    by, of_ours = {"en": ("paper", "ours"), "zh": ("论文", "我们")}[lang]
    published = {numbers["experiment"]: (model, numbers) for model, numbers in paper["models"].items()}
    rows, not_run = [], []
    for experiment in dict.fromkeys([*published, *results]):
        model, numbers = published.get(experiment, ("", {}))
        if model:
            cells = [f"{numbers[key]:.2f}" if key in numbers else "" for _, key in columns]
            rows.append([f"{model}, {by}", "", *cells])
        result = results.get(experiment)
        if result and (result[kind] or kind in result["stale"]):
            title = f"{model}, {of_ours} (`{result['shown']}`)" if model else f"`{result['shown']}`"
            rows.append(_our_row(title, result, kind, columns, numbers, lang))
        else:
            not_run.append(f"{model} (`{experiment}`)" if model else f"`{experiment}`")
    return rows, not_run


def _our_row(
    name: str, result: dict[str, Any], kind: str, columns: list[tuple[Any, str]], paper: dict[str, float], lang: str
) -> list[str]:
    if kind in result["stale"]:
        return [name, "", *[STALE[lang]] * len(columns)]
    scores, cells = result[kind], []
    for _, key in columns:
        if key not in scores:
            cells.append(NOT_RUN[lang])
            continue
        difference = f" ({scores[key] - paper[key]:+.2f})" if key in paper else ""
        bounds = f" {interval(scores['ci95'][key])}" if key in scores["ci95"] else ""
        cells.append(f"{scores[key]:.2f}{difference}{bounds}")
    return [name, f"{scores['n']:,}", *cells]


def printed(results: dict[str, dict[str, Any]]) -> str:
    """Return the scores as lines for a terminal: a row an experiment, without intervals."""
    columns = [("exam", *column) for column in EXAM_COLUMNS] + [("scores", *column) for column in dialogue_columns()]
    width = max(map(len, (result["shown"] for result in results.values())), default=0) + 2
    titles = header([(title, key) for _, title, key in columns], "en")
    lines = [" " * width + "".join(f"{title:>9}" for title in titles)]
    for result in results.values():
        cells = [
            STALE["en"] if kind in result["stale"] else (result[kind] or {}).get(key, "-") for kind, _, key in columns
        ]
        values = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells]
        lines.append(f"{result['shown']:{width}}" + "".join(f"{value:>9}" for value in values))
    return "\n".join(lines)


def cell(text: str, length: int = 160) -> str:
    """Return a model's text as it can stand in a table: one line, nothing that Markdown or HTML would read as its own."""
    line = " ".join(text.split())
    line = html.escape(line[:length] + ("…" if len(line) > length else ""), quote=False)
    return re.sub(r"[\\`*_{}\[\]()#+!|~]", r"\\\g<0>", line)
