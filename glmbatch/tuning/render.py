"""Renders a training's report as text, as a Markdown model card and as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glmbatch.errors import counted
from glmbatch.report.page import elements as html
from glmbatch.report.page.plots import Axis, bars
from glmbatch.report.page.plots import lines as plot
from glmbatch.store.files import committed
from glmbatch.tuning.report import CARD, CHECKPOINT, PAGE, REPORT, AnyScores, Comparison, Report
from glmbatch.tuning.scores import LabelScore, Scores, SelectionScores, TextScores

# Below this share, rows that lost their end hardly matter.
CUT_SHARE = 0.02
# With fewer training rows, TF-IDF was better on each of four Chinese sets, by 3 points or more.
FEW_ROWS = 1500
EXAMPLES = 2  # of each confusion
LABELS_DRAWN = 20


class Facts(NamedTuple):
    """The facts that every rendering shows, as lines of text; `rows` are names with counts."""

    title: str
    origin: str
    outcome: str
    scores: list[str]
    training: str
    warnings: list[str]
    rows: list[tuple[str, Any]]
    settings: str


def facts_of(report: Report) -> Facts:
    """The facts of a report, as text."""
    training = report.training
    audit = report.audit
    rows = {"rows": audit.rows, "used": audit.used, "without value": audit.without_value}
    rows |= {"without text": audit.without_text, "without label": audit.without_label}
    rows |= {"repeated": audit.repeated, "conflicting": audit.conflicting, "leaking": audit.leaking}
    # Reports of earlier versions lack these.
    if "cut_texts" in training:
        rows["cut texts"] = training["cut_texts"]
        if not report.labels:
            rows["cut answers"] = training["cut_answers"]
    return Facts(
        title=" / ".join(report.labels) or "answers",
        origin=f"Run {report.run} from {report.base}",
        outcome=f"{'promoted' if report.promoted else 'not promoted'}: {report.reason}",
        scores=_score_lines(report),
        training=f"{training['steps']} steps, best at step {training['best_step']}; "
        f"{training['trained_parameters']:,} of {training['parameters']:,} parameters trained; "
        f"temperature {training['temperature']:.3f}, folded into the head",
        warnings=_warnings(report),
        rows=[*rows.items(), *audit.parts.items()],
        settings=report.model_dump_json(
            include={"settings": True, "training": {"used"}, "versions": True}, indent=1
        ),
    )


def describe_scores(name: str, scores: AnyScores) -> str:
    """The scores of the model called `name`, on one line."""
    if isinstance(scores, TextScores):
        return (
            f"{name}: exact match {scores.exact_match:.4f}, ROUGE-L {scores.rouge_l:.4f} "
            f"on {scores.rows} rows"
        )
    calibration = "" if scores.ece is None else f", ECE {scores.ece:.4f}"
    if isinstance(scores, SelectionScores):
        return (
            f"{name}: micro-F1 {scores.micro_f1:.4f}, macro-F1 {scores.macro_f1:.4f}, all labels "
            f"right {scores.all_right:.4f}{calibration} on {scores.rows} rows"
        )
    return (
        f"{name}: accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}{calibration} "
        f"on {scores.rows} rows"
    )


def _score_lines(report: Report) -> list[str]:
    """One line each for the scores of the run, the baseline and the current checkpoint."""
    lines = [describe_scores("this run", report.scores)]
    if report.baseline is not None:
        lines.append(describe_scores(report.baseline_name, report.baseline))
    if report.current is not None:
        lines.append(describe_scores("the current checkpoint", report.current))
    if report.untrained is not None:
        lines.append(describe_scores("the untrained base", report.untrained))
    return [*lines, *map(_describe_comparison, report.comparisons)]


def _describe_comparison(comparison: Comparison) -> str:
    """How the run does beside another, on one line."""
    test = comparison.test
    outcome = "beaten" if test.is_better else "not beaten"
    low, high = test.interval
    return (
        f"{outcome}: {comparison.name} ({test.other:.4f}): {test.difference:+.4f}, 95 % interval "
        f"{low:+.4f} to {high:+.4f}, p {test.chance:.4f}"
        f"{'' if comparison.needed else '; need not be beaten'}"
    )


def _warnings(report: Report) -> list[str]:
    warnings = [*report.audit.warnings, *_cut_warnings(report.training)]
    if report.untrained_note:
        warnings.append(f"the untrained base was not scored: {report.untrained_note}")
    learned = report.audit.parts["train"]
    for comparison in report.comparisons:
        if comparison.test.difference >= 0:
            continue
        # By the score that decides; accuracy hides mistakes on rare labels.
        warning = f"{comparison.name} scores higher ({report.promoted_by})"
        if comparison.rival == "baseline":
            warning += _few_rows(learned)
            if report.baseline_model is not None:
                warning += f"; a job can use it: set model: {report.baseline_model}"
        warnings.append(warning)
    return warnings


def _few_rows(rows: int) -> str:
    """That TF-IDF usually wins with so few training rows; "" if they are enough."""
    if rows >= FEW_ROWS:
        return ""
    return f", as it usually does below {FEW_ROWS:,} training rows (these are {rows:,})"


def _cut_warnings(training: Mapping[str, Any]) -> Iterator[str]:
    learned = training.get("learned", 0)
    for what, setting in (("text", "max_input_tokens"), ("answer", "max_answer_tokens")):
        cut = training.get(f"cut_{what}s", 0)
        if learned and cut > CUT_SHARE * learned:
            yield (
                f"{cut} of {learned} {what}s in training are longer than training.{setting} "
                "and lost their end"
            )


def describe(report: Report) -> str:
    """The report as text for a terminal."""
    facts = facts_of(report)
    counts = ", ".join(f"{name} {count}" for name, count in facts.rows)
    lines = [
        counts,
        *(f"  warning: {warning}" for warning in facts.warnings),
        facts.origin,
        facts.training,
        *facts.scores,
        facts.outcome,
        f"report: {Path(report.checkpoint).parent / PAGE}",
        f"checkpoint: {report.checkpoint}",
    ]
    if report.baseline_model is not None:
        lines.append(f"baseline as a model: {report.baseline_model}")
    return "\n".join(lines)


def card(report: Report) -> str:
    """The model card as Markdown: the checkpoint's origin, scores and settings."""
    facts = facts_of(report)
    lines = [
        f"# {facts.title}",
        "",
        f"A ChatGLM2 fine-tuned by glmbatch. {facts.origin}.",
        "",
        *(f"- {line}" for line in (*facts.scores, facts.outcome, facts.training)),
        *(f"- warning: {warning}" for warning in facts.warnings),
        "",
        "## Rows",
        "",
        *(f"- {name}: {count}" for name, count in facts.rows),
        *(f"- {name}: sha256 {digest}" for name, digest in report.audit.files.items()),
        "",
        "## Settings and versions",
        "",
        "```json",
        facts.settings,
        "```",
        "",
    ]
    return "\n".join(lines)


def page(report: Report) -> str:
    """The report as a self-contained HTML file with plots."""
    facts = facts_of(report)
    outcome = f"{facts.outcome[0].upper()}{facts.outcome[1:]}."
    lines = [outcome, f"{facts.scores[0]}.", _look_first(report, facts.warnings)]
    parts = [
        html.paragraph(f"{facts.origin}.", soft=True),
        html.verdict(lines, "" if report.promoted and not facts.warnings else "watch"),
        *(html.paragraph(warning, warning=True) for warning in facts.warnings),
        html.heading("Scores on the test rows"),
        *(html.paragraph(line) for line in facts.scores),
    ]
    if isinstance(report.scores, Scores):
        parts += _classifier_parts(report, report.scores)
    elif isinstance(report.scores, SelectionScores):
        drawn = [_drawn_labels(report.scores.labels), _calibration(report.scores)]
        parts += [html.plots(drawn), _by_label(report.scores.labels)]
    if not isinstance(report.scores, Scores):
        parts += [html.heading("Answers unlike the expected ones"), _mistake_table(report)]
    parts += [
        html.heading("Learning"),
        html.paragraph(f"{facts.training}."),
        html.plots(_learning_plots(report.training["history"])),
        html.heading("Rows"),
        html.facts(facts.rows),
        html.table(["label", "rows"], list(report.audit.labels.items())),
        html.table(["file", "SHA-256 begins"], _digests(report.audit.files)),
        html.heading("Settings"),
        html.folded("Every setting and version", [html.preformatted(facts.settings)]),
    ]
    return html.page(facts.title, parts)


def _digests(files: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each file with the beginning of its digest, which the model card has whole."""
    return [(name, digest[:12]) for name, digest in files.items()]


def _look_first(report: Report, warnings: list[str]) -> str:
    """What a reader should look at first, as a sentence."""
    if warnings:
        return f"Look first at the {counted(len(warnings), 'warning')} below."
    scores = report.scores
    confused = _confusions(scores) if isinstance(scores, Scores) else []
    if not confused:
        return "Nothing asks for a look." if not report.mistakes else "Look first at the mistakes."
    label, guess, rows = confused[0]
    what = f"taken for {guess}" if guess else "left without an answer"
    return f"Look first at {label} {what}, {counted(rows, 'row')}."


def _confusions(scores: Scores) -> list[tuple[str, str, int]]:
    """Each label that was taken for another, with its number of rows, most frequent first."""
    pairs = []
    for label, guesses in scores.confusion.items():
        for guess, rows in guesses.items():
            if rows and guess != label:
                pairs.append((label, guess, rows))
    return sorted(pairs, key=lambda pair: -pair[2])


def _drawn_labels(labels: Mapping[str, LabelScore]) -> str:
    """Recall and precision of each label as bars; "" if there are too many labels."""
    if len(labels) > LABELS_DRAWN:
        return ""
    recall = [of_label.recall for of_label in labels.values()]
    precision = [of_label.precision for of_label in labels.values()]
    axis = Axis("", percent=True, ends=(0, 1))
    return bars("by label", axis, [*labels], [("recall", recall), ("precision", precision)])


def _by_label(labels: Mapping[str, LabelScore]) -> str:
    lines = []
    for label, of_label in labels.items():
        numbers = [of_label.precision, of_label.recall, of_label.f1]
        lines.append([label, *map(_four_digits, numbers), of_label.rows])
    return html.table(["label", "precision", "recall", "F1", "rows"], lines)


def _calibration(scores: Scores | SelectionScores) -> str:
    """How often a label is right, by the probability that the model gave it."""
    # On the diagonal, confidence equals accuracy.
    points = [(confidence, accuracy) for _, confidence, accuracy in scores.bins]
    if not points:
        return ""
    series = [("model", points), ("ideal", [(0.0, 0.0), (1.0, 1.0)])]
    right = Axis("share that is right", ends=(0, 1))
    return plot("calibration", Axis("confidence", ends=(0, 1)), right, series)


def _classifier_parts(report: Report, scores: Scores) -> list[str]:
    """The scores by label, the calibration plot and the confusions with examples of each."""
    labels = report.labels
    confusion = []
    for label in labels:
        confusion.append([scores.confusion[label][guess] for guess in (*labels, "")])
    return [
        html.plots([_drawn_labels(scores.labels), _calibration(scores)]),
        _by_label(scores.labels),
        html.heading("Confusion"),
        html.paragraph("A row for each true label, a column for each answer.", soft=True),
        html.heat(["", *labels, "none"], labels, confusion),
        _confusion_table(report, scores),
    ]


def _confusion_table(report: Report, scores: Scores) -> str:
    """Examples of each confusion, the most frequent confusion first; "" without mistakes."""
    rows = []
    for label, guess, number in _confusions(scores):
        examples = [
            mistake
            for mistake in report.mistakes
            if (mistake.label, mistake.predicted) == (label, guess)
        ]
        for mistake in examples[:EXAMPLES]:
            confidence = _four_digits(mistake.confidence)
            rows.append([label, guess or "none", number, mistake.text, confidence, mistake.place])
    head = ["true label", "answer", "rows", "an example", "confidence", "row"]
    return html.table(head, rows) if rows else ""


def _learning_plots(history: list[dict[str, float]]) -> list[str]:
    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in history if key in line]

    # Training loss and validation are logged at different steps.
    loss, valid_loss = points("loss"), points("eval_loss")
    name = "micro-F1" if points("eval_micro_f1") else "accuracy"
    measured = points("eval_micro_f1") or points("eval_accuracy")
    steps = Axis("step", ends=(0.0,))
    scores = Axis(f"{name} on validation rows", percent=True, ends=(1.0,))
    return [
        plot("loss", steps, Axis("loss"), [("training", loss), ("validation", valid_loss)]),
        plot("validation", steps, scores, [(name, measured)]),
    ]


def _mistake_table(report: Report) -> str:
    """The mistakes, most confident first."""
    rows = []
    for mistake in report.mistakes:
        rows.append([mistake.text, mistake.label, mistake.predicted or "none", mistake.place])
    return html.table(["text", "expected", "answer", "row"], rows)


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def write_report(report: Report, run: Path) -> None:
    """Write report.html, the model card and report.json into the folders of the run."""
    # report.json marks the run as evaluated, so it comes last.
    texts = {
        run / PAGE: page(report),
        run / CHECKPOINT / CARD: card(report),
        run / REPORT: report.model_dump_json(indent=1),
    }
    for path, text in texts.items():
        with committed(path, "output") as partial:
            partial.write_text(text, encoding="utf-8")
