"""The report's figures, as PNG files, from what the steps wrote; a figure of nothing is no file.

Labels are Chinese only where the machine has a font that can show it, so that no figure shows boxes.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medasst_tools.evaluation.score import metric_names
from medasst_tools.evaluation.statistics import calibration_bins
from medasst_tools.training import checkpoints

CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS",
)  # fmt: skip
SMOOTHED_LOGS = 5
Say = Callable[[str, str], str]


def draw_all(results: dict[str, dict[str, Any]], titles: dict[str, str], subjects: dict[str, str], folder: Path,
             lang: str) -> dict[str, Path]:  # fmt: skip
    """Draw what can be drawn; {name: file}. `titles` names experiments, `subjects` has the exams' Chinese names."""
    say = _speaker(lang)

    figures = {
        "figure4": (_scores_by_metric, "scores"),
        "by_subject": (functools.partial(_exams_by_subject, subjects=subjects), "exam"),
        "calibration": (_calibration, "exam_rows"),
        "training_loss": (_training_loss, "losses"),
    }
    drawn = {}
    for name, (draw, key) in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if there := {titles[name]: result[key] for name, result in results.items() if result[key]}:
            _save(draw(there, say), path)
            drawn[name] = path
    return drawn


def _speaker(lang: str) -> Say:
    """Return say(english, chinese) for the figures' language, English if no font here has Chinese."""
    font = chinese_font()
    if font:
        from matplotlib import rcParams

        rcParams["font.sans-serif"] = [font, "DejaVu Sans"]
        rcParams["axes.unicode_minus"] = False  # the fonts above have no U+2212
    return (lambda english, chinese: chinese) if lang == "zh" and font else (lambda english, chinese: english)


def chinese_font() -> str | None:
    """Return the name of an installed font with simplified Chinese, None if there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib's own list knows no font that was installed later
        if path not in known:
            with contextlib.suppress(RuntimeError, OSError):  # a file that it can't read
                manager.addfont(path)
    installed = {font.name for font in manager.ttflist}
    return next((name for name in CHINESE_FONTS if name in installed), None)


def _axes(size: tuple[float, float] = (8, 4.5)):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _errors(rows: list[tuple[float, list[float] | None]]) -> list[list[float]]:
    """Return matplotlib's [below, above] of (mean, [low, high]) rows; no line where there is no interval."""
    return [[abs(mean - interval[side]) if interval else 0.0 for mean, interval in rows] for side in (0, 1)]


def _scores_by_metric(scores: dict[str, dict[str, Any]], say: Say):
    """The paper's Figure 4: bars grouped by metric, a colour a model."""
    figure, axes = _axes()
    metrics, width = metric_names(), 0.8 / len(scores)
    for place, (name, row) in enumerate(scores.items()):
        positions = [group + (place - (len(scores) - 1) / 2) * width for group in range(len(metrics))]
        bars = axes.bar(
            positions, [row[metric] for metric in metrics], width * 0.92, color=f"C{place}", capsize=3,
            yerr=_errors([(row[metric], row["ci95"][metric]) for metric in metrics]), label=f"{name} (n={row['n']:,})",
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(range(len(metrics)), [metric.upper() for metric in metrics])
    axes.set_ylabel(say("score, percent (lines: 95 % interval)", "得分，百分比（线段：95% 置信区间）"))
    axes.legend(frameon=False)
    return figure


def _exams_by_subject(exams: dict[str, dict[str, Any]], say: Say, subjects: dict[str, str]):
    """Return accuracy with Wilson's interval per subject, and the line of chance."""
    names = list(dict.fromkeys(subject for exam in exams.values() for subject in exam["by_subject"]))
    figure, axes = _axes(size=(8, 1.2 + 0.3 * len(names) * (1 + len(exams)) / 2))
    width = 0.8 / len(exams)
    for place, (name, exam) in enumerate(exams.items()):
        there = [(names.index(subject), row) for subject, row in exam["by_subject"].items()]
        axes.barh(
            [at + place * width for at, _ in there], [row["accuracy"] for _, row in there], width * 0.92, capsize=2,
            xerr=_errors([(row["accuracy"], row["ci95"]) for _, row in there]), color=f"C{place}", label=name,
        )  # fmt: skip
    axes.axvline(25, color="grey", linestyle=":", label=say("chance", "随机"))
    axes.set_yticks(
        [at + 0.4 - width / 2 for at in range(len(names))], [say(name, subjects.get(name, name)) for name in names]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(say("right answers, percent (lines: 95 % interval)", "正确率，百分比（线段：95% 置信区间）"))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _calibration(exams: dict[str, list[dict[str, Any]]], say: Say):
    """Return the share of right answers over the model's probability of its answer; the diagonal is calibrated."""
    figure, axes = _axes(size=(5.5, 4.5))
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label=say("calibrated", "完全校准"))
    for place, (name, rows) in enumerate(exams.items()):
        bins = calibration_bins(rows)
        axes.plot(
            [100 * confidence for _, confidence, _ in bins], [100 * accuracy for _, _, accuracy in bins], "o-",
            color=f"C{place}", label=name,
        )  # fmt: skip
    axes.set_xlabel(say("probability of the chosen answer, percent", "所选答案的概率，百分比"))
    axes.set_ylabel(say("right answers, percent", "正确率，百分比"))
    axes.set(xlim=(20, 100), ylim=(0, 100))
    axes.legend(frameon=False)
    return figure


def _training_loss(losses: dict[str, list[tuple[int, float]]], say: Say):
    """Return the logged losses, and their running mean over the last SMOOTHED_LOGS logs."""
    figure, axes = _axes()
    for place, (name, points) in enumerate(losses.items()):
        steps, values = zip(*points, strict=True)
        means = [
            sum(values[max(0, at - SMOOTHED_LOGS + 1) : at + 1]) / min(at + 1, SMOOTHED_LOGS)
            for at in range(len(values))
        ]
        axes.plot(steps, values, color=f"C{place}", alpha=0.25)
        axes.plot(steps, means, color=f"C{place}", label=name)
    axes.set_xlabel(say("step", "训练步"))
    axes.set_ylabel(say("training loss", "训练损失"))
    axes.legend(frameon=False)
    return figure


def read_losses(output_dir: Path) -> list[tuple[int, float]]:
    """Return (step, loss) as LLaMA-Factory logged them in a run's folder; of a resumed run each step's last loss."""
    rows = checkpoints.read_log(output_dir)
    return sorted({row["current_steps"]: row["loss"] for row in rows if "loss" in row}.items())
