"""What a recipe leaves at the end: scores, figures, the model card."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..hub.model_card import model_card

CONTENTS = {
    "model.safetensors": "the model, for from_pretrained and pipeline",
    "tokenizer.json": "its tokenizer",
    "README.md": "model card",
    "scores.json": "the scores above",
    "predictions_*": "one line per example",
    "confusion_matrix_*.png": "predicted and true labels",
    "learning_curve.png": "loss during training",
    "checkpoint-*": "for --resume_from_checkpoint",
}


def write_report(trainer: Trainer, scores: dict[str, Any], summary: str, dataset: str | None, **metadata: Any) -> None:
    """Print the summary of the scores and list the files of the run; save `scores.json` and the model card.

    With `--push_to_hub`, everything but checkpoints is pushed. To be called by every process.

    Args:
        scores, summary: those of the main process count.
        dataset: what the model was trained on; None: write no model card.
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
        model_card(model, str(folder), tokenizer, trainer.state, **metadata).save(folder / "README.md")
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
