"""The report's figures, as PNG files, from what the steps wrote; a figure of nothing is no file.

Labels are Chinese only where the machine has a font that can show it, so that no figure shows boxes.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
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


def draw_all(results: dict[str, dict[str, Any]], subjects: dict[str, str], folder: Path, lang: str) -> dict[str, Path]:
    """Draw what can be drawn; {name: file}. `subjects` has the exams' Chinese names."""
    say = _speaker(lang)
    from matplotlib import pyplot

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
        if there := {result["shown"]: result[key] for result in results.values() if result[key]}:
            folder.mkdir(parents=True, exist_ok=True)
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes, there, say)
            figure.savefig(path, dpi=150, metadata={"Software": None})
            pyplot.close(figure)
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


def _bars(
    draw: Callable, error: str, models: dict[str, list[tuple[int, float, list[float] | None]]], **look: Any
) -> list:
    """Draw (place, mean, interval) rows side by side at each place, a colour a model; return each model's bars."""
    width, drawn = 0.8 / len(models), []
    for at, (name, rows) in enumerate(models.items()):
        places = [place + (at - (len(models) - 1) / 2) * width for place, _, _ in rows]
        means = [mean for _, mean, _ in rows]
        # matplotlib's [below, above]; no line where there is no interval
        ends = [[abs(mean - (bounds or (mean, mean))[side]) for _, mean, bounds in rows] for side in (0, 1)]
        drawn.append(draw(places, means, width * 0.92, **{error: ends}, color=f"C{at}", label=name, **look))
    return drawn


def _scores_by_metric(axes, scores: dict[str, dict[str, Any]], say: Say) -> None:
    """The paper's Figure 4: bars grouped by metric, a colour a model."""
    metrics = metric_names()
    models = {
        f"{name} (n={row['n']:,})": [(at, row[metric], row["ci95"][metric]) for at, metric in enumerate(metrics)]
        for name, row in scores.items()
    }
    for bars in _bars(axes.bar, "yerr", models, capsize=3):
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(range(len(metrics)), [metric.upper() for metric in metrics])
    axes.set_ylabel(say("score, percent (lines: 95 % interval)", "得分，百分比（线段：95% 置信区间）"))
    axes.legend(frameon=False)


def _exams_by_subject(axes, exams: dict[str, dict[str, Any]], say: Say, subjects: dict[str, str]) -> None:
    """Accuracy with Wilson's interval per subject, and the line of chance."""
    names = list(dict.fromkeys(subject for exam in exams.values() for subject in exam["by_subject"]))
    axes.figure.set_size_inches(8, 1.2 + 0.3 * len(names) * (1 + len(exams)) / 2)
    models = {
        name: [(names.index(subject), row["accuracy"], row["ci95"]) for subject, row in exam["by_subject"].items()]
        for name, exam in exams.items()
    }
    _bars(axes.barh, "xerr", models, capsize=2)
    axes.axvline(25, color="grey", linestyle=":", label=say("chance", "随机"))
    axes.set_yticks(range(len(names)), [say(name, subjects.get(name, name)) for name in names])
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 100),
        xlabel=say("right answers, percent (lines: 95 % interval)", "正确率，百分比（线段：95% 置信区间）"),
    )
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)


def _calibration(axes, exams: dict[str, list[dict[str, Any]]], say: Say) -> None:
    """The share of right answers over the model's probability of its answer; the diagonal is calibrated."""
    axes.figure.set_size_inches(5.5, 4.5)
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label=say("calibrated", "完全校准"))
    for place, (name, rows) in enumerate(exams.items()):
        points = [(100 * confidence, 100 * accuracy) for _, confidence, accuracy in calibration_bins(rows)]
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{place}", label=name)
    axes.set(xlim=(20, 100), xlabel=say("probability of the chosen answer, percent", "所选答案的概率，百分比"))
    axes.set(ylim=(0, 100), ylabel=say("right answers, percent", "正确率，百分比"))
    axes.legend(frameon=False)


def _training_loss(axes, losses: dict[str, list[tuple[int, float]]], say: Say) -> None:
    """The logged losses, and their running mean over the last SMOOTHED_LOGS logs."""
    for place, (name, points) in enumerate(losses.items()):
        steps, values = zip(*points, strict=True)
        means = [fmean(values[max(0, end - SMOOTHED_LOGS) : end]) for end in range(1, len(values) + 1)]
        axes.plot(steps, values, color=f"C{place}", alpha=0.25)
        axes.plot(steps, means, color=f"C{place}", label=name)
    axes.set(xlabel=say("step", "训练步"), ylabel=say("training loss", "训练损失"))
    axes.legend(frameon=False)


def read_losses(output_dir: Path) -> list[tuple[int, float]]:
    """Return (step, loss) as LLaMA-Factory logged them in a run's folder; of a resumed run each step's last loss."""
    rows = checkpoints.read_log(output_dir)
    return sorted({row["current_steps"]: row["loss"] for row in rows if "loss" in row}.items())
