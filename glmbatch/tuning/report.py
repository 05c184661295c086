"""A run's report for people: one HTML file with its plots inside, the same facts as JSON, and a model card."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from glmbatch.report import page as html
from glmbatch.store.files import committed
from glmbatch.tuning.scores import Scores, TextScores

if TYPE_CHECKING:
    from glmbatch.tuning.finetune import Report

PACKAGES = (
    "glmbatch",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "scikit-learn",
    "sentencepiece",
    "pyarrow",
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
        [(line["step"], line[key]) for line in history if key in line]
        for key in ("loss", "eval_loss", "eval_accuracy")
    )
    return html.page(
        _title(report),
        [
            html.paragraph(
                f"{'Promoted' if report.promoted else 'Not promoted'}: {report.reason}."
            ),
            html.paragraph(f"Run {report.run} from {report.base}."),
            html.heading("Scores on the test rows"),
            *(html.paragraph(line) for line in compared(report)),
            *(_labels_part(report, report.scores) if isinstance(report.scores, Scores) else []),
            html.heading("Learning"),
            html.lines("loss by step", "step", "loss", [("train", losses), ("valid", valid)]),
            html.lines("validation accuracy by step", "step", "accuracy", [("accuracy", right)]),
            html.heading("Rows"),
            html.facts((name, getattr(audit, name)) for name in FACTS),
            html.table(["label", "rows"], list(audit.labels.items())),
            *(html.paragraph(warning, warning=True) for warning in audit.warnings),
            html.heading("Worst mistakes"),
            html.table(
                ["text", "expected", "given", "sure", "row"],
                [
                    [m.text, m.label, m.predicted or "none", _n(m.confidence), m.place]
                    for m in report.mistakes
                ],
            ),
            html.heading("Settings"),
            html.preformatted(report.model_dump_json(include={"settings", "versions"}, indent=1)),
        ],
    )


def _labels_part(report: Report, scores: Scores) -> list[str]:
    return [
        html.table(
            ["label", "precision", "recall", "F1", "rows"],
            [
                [k, _n(one.precision), _n(one.recall), _n(one.f1), one.rows]
                for k, one in scores.labels.items()
            ],
        ),
        html.heading("Confusion (rows: true, columns: predicted)"),
        html.table(
            ["", *report.labels, "none"],
            [
                [true, *(scores.confusion[true][guess] for guess in [*report.labels, ""])]
                for true in report.labels
            ],
        ),
        html.heading("Calibration"),
        html.paragraph(f"Temperature {report.training['temperature']:.3f}, folded into the head."),
        html.lines(
            "accuracy by confidence",
            "confidence",
            "accuracy",
            [("model", [(p, a) for _, p, a in scores.bins]), ("ideal", [(0, 0), (1, 1)])],
        ),
    ]


FACTS = (
    "rows",
    "used",
    "without_text",
    "without_label",
    "repeated",
    "conflicting",
    "leaking",
    "parts",
)


def _n(value: float) -> str:
    return f"{value:.4f}"
