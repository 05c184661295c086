"""A run's report for people: one HTML file with its plots inside, the same facts as JSON, and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from glmbatch.data.storage import committed
from glmbatch.tuning.scores import Scores, TextScores

if TYPE_CHECKING:
    from glmbatch.tuning.finetune import Report

PACKAGES = ("glmbatch", "torch", "transformers", "peft", "accelerate", "scikit-learn", "sentencepiece", "pyarrow")
WIDTH, HEIGHT, EDGE = 460, 260, 42
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right}"
    "td:first-child,th:first-child,td.text{text-align:left}svg{background:#fafafa;margin:.3em}.warn{color:#a40}"
)


def versions() -> dict[str, str]:
    """Of what may change the result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_report(report: Report, run: Path) -> None:
    """report.html and the model card, then report.json: with that the run is done."""
    from glmbatch.tuning.finetune import CARD, CHECKPOINT, PAGE, REPORT

    texts = {
        run / PAGE: page(report),
        run / CHECKPOINT / CARD: card(report),
        run / REPORT: report.model_dump_json(indent=1),
    }
    for path, text in texts.items():
        with committed(path) as partial:
            partial.write_text(text, encoding="utf-8")


def card(report: Report) -> str:
    """What stands beside the checkpoint: where it comes from, and how good it is."""
    training = report.training
    lines = [
        f"# {_title(report)}",
        "",
        f"A ChatGLM2 from {report.base}, by glmbatch, run {report.run}.",
        "",
        *(f"- {line}" for line in compared(report)),
        f"- {report.reason}",
        f"- {training['steps']} steps, best at {training['best_step']}; {training['trained_parameters']:,} of "
        f"{training['parameters']:,} parameters trained; temperature {training['temperature']:.3f}, in the head",
        "",
        "## Rows",
        "",
        *(f"- {name}: sha256 {digest}" for name, digest in report.audit.files.items()),
        "",
        "## Settings and versions",
        "",
        "```json",
        report.model_dump_json(include={"settings", "versions"}, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _title(report: Report) -> str:
    return " / ".join(report.labels) or "answers"


def compared(report: Report) -> list[str]:
    """The scores of the run, of the baseline and of what was promoted before, each a line."""
    each = [("this run", report.scores), (report.baseline_name, report.baseline)]
    each.append(("the current checkpoint", report.current))
    return [describe_scores(name, scores) for name, scores in each if scores is not None]


def describe_scores(name: str, scores: Scores | TextScores) -> str:
    """One line."""
    if isinstance(scores, TextScores):
        return f"{name}: exact match {scores.exact_match:.4f}, ROUGE-L {scores.rouge_l:.4f} on {scores.rows} rows"
    sure = "" if scores.ece is None else f", ECE {scores.ece:.4f}"
    return f"{name}: accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}{sure} on {scores.rows} rows"


def page(report: Report) -> str:
    """The HTML; nothing is loaded from elsewhere."""
    history, audit = report.training["history"], report.audit
    losses, valid, right = (
        [(line["step"], line[key]) for line in history if key in line] for key in ("loss", "eval_loss", "eval_accuracy")
    )
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            f"<title>{escape(report.run)}</title><style>{STYLE}</style>",
            f"<h1>{escape(_title(report))}</h1>",
            f"<p>{'Promoted' if report.promoted else 'Not promoted'}: {escape(report.reason)}.",
            f"<p>Run {escape(report.run)} from {escape(report.base)}.",
            "<h2>Scores on the test rows</h2>",
            *(f"<p>{escape(line)}" for line in compared(report)),
            *(_labels_part(report, report.scores) if isinstance(report.scores, Scores) else []),
            "<h2>Learning</h2>",
            _plot("loss by step", [("train", losses), ("valid", valid)]),
            _plot("validation accuracy by step", [("accuracy", right)]),
            "<h2>Rows</h2>",
            _table(["", ""], [(name, getattr(audit, name)) for name in FACTS]),
            _table(["label", "rows"], list(audit.labels.items())),
            *(f"<p class=warn>{escape(warning)}" for warning in audit.warnings),
            "<h2>Worst mistakes</h2>",
            _table(
                ["text", "expected", "given", "sure", "row"],
                [[m.text, m.label, m.predicted or "none", _n(m.confidence), m.place] for m in report.mistakes],
            ),
            "<h2>Settings</h2>",
            f"<pre>{escape(report.model_dump_json(include={'settings', 'versions'}, indent=1))}</pre></html>",
        ]
    )


def _labels_part(report: Report, scores: Scores) -> list[str]:
    return [
        _table(
            ["label", "precision", "recall", "F1", "rows"],
            [[k, _n(one.precision), _n(one.recall), _n(one.f1), one.rows] for k, one in scores.labels.items()],
        ),
        "<h2>Confusion (rows: true, columns: predicted)</h2>",
        _table(
            ["", *report.labels, "none"],
            [[true, *(scores.confusion[true][guess] for guess in [*report.labels, ""])] for true in report.labels],
        ),
        "<h2>Calibration</h2>",
        f"<p>Temperature {report.training['temperature']:.3f}, folded into the head.",
        _plot(
            "accuracy by confidence",
            [("model", [(p, a) for _, p, a in scores.bins]), ("ideal", [(0, 0), (1, 1)])],
        ),
    ]


FACTS = ("rows", "used", "without_text", "without_label", "repeated", "conflicting", "leaking", "parts")


def _n(value: float) -> str:
    return f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{escape(name)}" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(value))}" for value in row) for row in rows)
    return f"<table><tr>{cells}{body}</table>"


def _plot(title: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines over common axes as SVG."""
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def x(value: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * (value - left) / (right - left)

    def y(value: float) -> float:
        return HEIGHT - EDGE + (2 * EDGE - HEIGHT) * (value - low) / (high - low)

    drawn = []
    for colour, (name, line) in zip(("#06c", "#c40", "#888"), lines, strict=False):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        drawn += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" fill="{colour}"/>' for a, b in line]
        place = 16 * len([each for each in drawn if each.startswith("<text")])
        drawn.append(f'<text x="{WIDTH - EDGE - 80}" y="{EDGE + place}" fill="{colour}">{escape(name)}</text>')
    axes = (
        f'<path d="M{EDGE} {EDGE}V{HEIGHT - EDGE}H{WIDTH - EDGE}" fill="none" stroke="#444"/>'
        f'<text x="{EDGE}" y="20">{escape(title)}</text>'
        f'<text x="2" y="{HEIGHT - EDGE}" font-size="11">{low:.3g}</text><text x="2" y="{EDGE + 6}" font-size="11">'
        f'{high:.3g}</text><text x="{EDGE}" y="{HEIGHT - EDGE + 16}" font-size="11">{left:g}</text>'
        f'<text x="{WIDTH - EDGE - 20}" y="{HEIGHT - EDGE + 16}" font-size="11">{right:g}</text>'
    )
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}">{axes}{"".join(drawn)}</svg>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
