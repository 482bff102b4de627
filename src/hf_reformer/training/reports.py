"""What a recipe leaves at the end: scores, figures, the model card."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..hub.model_card import model_card

CONTENTS = {
    "model.safetensors": "the model, for from_pretrained and pipeline",
    "tokenizer.json": "its tokenizer",
    "preprocessor_config.json": "what prepares recordings or pictures for it",
    "vocab.json": "its characters",
    "README.md": "model card",
    "scores.json": "the scores above",
    "predictions_*": "one line per example",
    "confusion_matrix_*.png": "predicted and true labels",
    "highlights_*.html": "texts with what was predicted and what is true",
    "answers_*.png": "where answers lie and were found, by kind of question",
    "choices_*.png": "places of the true choice, and how sure the model was",
    "recommendations_*.png": "hit rate by number of recommendations, and how popular they are",
    "heard_*.png": "spectra over time, and what was heard when",
    "forecast_*.png": "past, true future, forecast and its band",
    "trajectories_*.png": "ways on the plane, true and forecast",
    "drawn.png": "pictures that the model drew",
    "replies_*.png": "bits per byte over a conversation, and places of the true reply among others",
    "dialogue_*.jsonl": "what the model answers to a user of the data",
    "item_titles.json": "titles of the items",
    "learning_curve.png": "loss during training",
    "_pretrained": "the model before the task, for --model_name_or_path",
    "checkpoint-*": "for --resume_from_checkpoint",
}


def write_report(trainer: Trainer, scores: dict[str, Any], summary: str, dataset: str | None, **metadata: Any) -> None:
    """Print the summary of the scores and list the files of the run; save `scores.json` and the model card.

    With `--push_to_hub`, everything but checkpoints is pushed. To be called by every process.

    Args:
        scores, summary: those of the main process count.
        dataset: what the scores are of, in words; None: write no model card.
        metadata: of the model card.
    """
    if trainer.is_world_process_zero():
        _write_report(trainer, scores, summary, dataset, metadata)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _write_report(
    trainer: Trainer, scores: dict[str, Any], summary: str, dataset: str | None, metadata: dict[str, Any]
) -> None:
    folder = Path(trainer.args.output_dir)
    tokenizer: Any = trainer.processing_class
    (folder / "scores.json").write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if dataset is not None:
        trained = trainer.state.global_step > 0
        if trained:
            trainer.save_state()  # again, with the last evaluation
        metadata |= {"training": extract_hyperparameters_from_trainer(trainer) if trained else None}
        notes = f"## Scores\n\n{summary}" if summary else None
        metadata |= {"dataset_name": dataset, "notes": notes, "with_code": False}
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        name = trainer.hub_model_id if trainer.args.push_to_hub else str(folder)
        model_card(model, name, tokenizer, trainer.state, **metadata).save(folder / "README.md")
    print(f"\n{summary}\n\nThe results are in {folder}/")
    for pattern, content in CONTENTS.items():
        if names := ", ".join(sorted(file.name for file in folder.glob(pattern))):
            print(f"  {names:36} {content}")


def format_table(scores: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a row per model and a column per metric; nothing without a model."""
    if not scores:
        return ""
    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    first, widths = max(map(len, scores)), {metric: max(5, len(metric)) for metric in metrics}
    lines = [
        f"| {'':{first}} | " + " | ".join(f"{metric:>{widths[metric]}}" for metric in metrics) + " |",
        f"|:{'-' * first}-|" + "|".join("-" * (widths[metric] + 1) + ":" for metric in metrics) + "|",
    ]
    for model, row in scores.items():
        cells = (f"{row[metric]:{widths[metric]}.3f}" if metric in row else " " * widths[metric] for metric in metrics)
        lines.append(f"| {model:{first}} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_tables(tables: Mapping[str, dict[str, dict[str, float]]], splits: Mapping[str, Any], what: str) -> str:
    """The table of every split, below its name and size: `validation: 900 texts`."""
    parts = [f"{split}: {len(splits[split])} {what}\n\n{format_table(table)}" for split, table in tables.items()]
    return "\n\n".join(parts)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON object a line."""
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Highlighted(NamedTuple):
    """A text with marked spans, each (start, end, label), none empty; those that are true and those predicted."""

    heading: str
    text: str
    true: list[tuple[int, int, str]]
    predicted: list[tuple[int, int, str]]


_STYLE = """body{font:16px/1.6 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em}
h3{margin:2em 0 .3em;font-size:1em}.true{border-bottom:3px solid #2e7d32}.predicted{background:#ffe082}
sup{font-size:.65em;color:#555}p{white-space:pre-wrap;margin:0}"""
_AROUND = 600  # characters that are shown before and after the marked ones
_SHOWN = 100  # texts on a page


def write_highlights(file: Path, title: str, examples: Iterable[Highlighted]) -> None:
    """A page of texts, the first hundred: what is true is underlined, what was predicted has a background."""
    page = [f"<!doctype html><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"]
    page.append(f"<h1>{escape(title)}</h1><p><span class='predicted'>predicted</span>, <span class='true'>true</span>")
    for heading, text, true, predicted in islice(examples, _SHOWN):
        kinds = {"true": true, "predicted": predicted}
        changes = {kind: Counter[int]() for kind in kinds}  # of the number of spans around a character
        for kind, spans in kinds.items():
            for start, end, _ in spans:
                changes[kind].update({start: 1})
                changes[kind].subtract({end: 1})
        labels: dict[int, list[str]] = {}  # by where their spans end
        for _, end, label in predicted:
            labels.setdefault(end, []).append(label)
        places = [place for change in changes.values() for place in change]
        low, high = max(0, min(places, default=0) - _AROUND), min(len(text), max(places, default=0) + _AROUND)
        borders = sorted({low, high, *places})
        pieces, around = ["…" if low else ""], Counter[str]()
        for start, end in pairwise(borders):
            around.update({kind: change[start] for kind, change in changes.items()})
            piece, classes = escape(text[start:end]), " ".join(kind for kind in kinds if around[kind])
            pieces.append(f"<span class='{classes}'>{piece}</span>" if classes else piece)
            pieces += [f"<sup>{escape(label)}</sup>" for label in labels.get(end, ()) if label]
        pieces.append("…" if high < len(text) else "")
        page.append(f"<h3>{escape(heading)}</h3><p>{''.join(pieces)}</p>")
    file.write_text("\n".join(page) + "\n", encoding="utf-8")


def draw_learning_curve(trainer: Trainer, metric: str, bits_per_nat: float) -> None:
    """Draw the training loss and the scores of all evaluations over the steps, both in bits per byte."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, scale, label in (("loss", bits_per_nat, "training"), (f"eval_{metric}", 1.0, "validation")):
        points = [(entry["step"], entry[key] * scale) for entry in trainer.state.log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=label)
    axes.set(xlabel="step", ylabel=metric.replace("_", " "), ylim=(None, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(trainer.args.output_dir) / "learning_curve.png", dpi=120)
