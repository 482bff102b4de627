"""What `train_classification.py` tells at the end: baselines, predictions, pictures, the model card, a look back."""

import json
from pathlib import Path

import numpy as np
import torch
from _classification import MULTI, REGRESSION, SINGLE, Metrics, Task
from _models import write_model_card
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, Trainer, pipeline

from hf_reformer.data.demo_corpus import clean_source

CONTENTS = {
    "model.safetensors": "the model; from_pretrained and pipeline take the folder's name",
    "tokenizer.json": "its tokenizer",
    "README.md": "model card",
    "scores.json": "the table above",
    "predictions_*.csv": "one row per text",
    "confusion_matrix_*.png": "what is taken for what",
    "checkpoint-*": "for --resume_from_checkpoint",
}


def baselines(metrics: Metrics, train: Dataset, evaluation: Dataset) -> dict[str, dict[str, float]]:
    """What always guessing the most frequent answer, and TF-IDF with a linear model, reach on the same split."""
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    task = metrics.task
    regression = task.problem_type == REGRESSION
    linear = Ridge() if regression else LogisticRegression(C=10, max_iter=1000)
    if task.problem_type == MULTI:
        linear = OneVsRestClassifier(linear)
    models = {
        "mean of train" if regression else "most frequent label": DummyRegressor()
        if regression
        else DummyClassifier(),
        f"TF-IDF + {'ridge' if regression else 'logistic'} regression": make_pipeline(
            TfidfVectorizer(sublinear_tf=True), linear
        ),
    }
    kind = float if regression else int
    x, y = _joined(task, train), np.asarray(train["labels"], dtype=kind)
    x_eval, y_eval = _joined(task, evaluation), np.asarray(evaluation["labels"], dtype=kind)
    return {name: metrics.score(model.fit(x, y).predict(x_eval), y_eval) for name, model in models.items()}


def _joined(task: Task, dataset: Dataset) -> list[str]:
    texts, pairs = task.texts(dataset), task.pairs(dataset)
    return texts if pairs is None else [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]


def write_predictions(file: Path, task: Task, dataset: Dataset, logits: np.ndarray) -> None:
    """A csv with a row per text, in the order of the data: label (if known), prediction and its probability."""
    import pandas as pd

    predictions, probabilities = task.decide(logits)
    table: dict[str, list] = {"row": list(range(len(dataset)))}
    if "path" in dataset.column_names:
        table["path"] = dataset["path"]
    if "labels" in dataset.column_names:
        table["label"] = [task.spell(label) for label in dataset["labels"]]
    table["prediction"] = [task.spell(label) for label in predictions]
    if task.problem_type == SINGLE:
        table["probability"] = [round(float(p), 6) for p in probabilities.max(axis=-1)]
    if task.problem_type == MULTI:
        for i, name in enumerate(task.names):
            table[f"probability of {name}"] = [round(float(p), 6) for p in probabilities[:, i]]
    pd.DataFrame(table).to_csv(file, index=False)


def draw_confusion_matrix(file: Path, task: Task, labels: np.ndarray, predictions: np.ndarray, title: str) -> None:
    """Rows are the true labels, columns the predicted ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay

    side = max(4.0, 1.5 + 0.55 * len(task.names))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        labels,
        predictions,
        labels=range(len(task.names)),
        display_labels=task.names,
        xticks_rotation=45,
        cmap="Blues",
        colorbar=False,
        ax=axes,
    )
    axes.set_title(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table, a row per model and a column per metric."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    first, widths = max(map(len, rows)), {name: max(5, len(name)) for name in names}
    lines = [
        f"| {'':{first}} | " + " | ".join(f"{name:>{widths[name]}}" for name in names) + " |",
        f"|:{'-' * first}-|" + "|".join("-" * (widths[name] + 1) + ":" for name in names) + "|",
    ]
    for model, scores in rows.items():
        cells = (f"{scores[name]:{widths[name]}.3f}" if name in scores else " " * widths[name] for name in names)
        lines.append(f"| {model:{first}} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summarise(
    trainer: Trainer, metrics: Metrics, splits: DatasetDict, scores: dict[str, dict], dataset: str, compare: bool
) -> None:
    """Print the scores, with `compare` beside the baselines; leave them in `scores.json` and in the model card."""
    folder, report = Path(trainer.args.output_dir), []
    for split, score in scores.items():
        rows = {"Reformer": score}
        if compare and "train" in splits:
            rows |= baselines(metrics, splits["train"], splits[split])
        scores[split] = rows
        report.append(f"{split}: {len(splits[split])} texts\n\n{format_table(rows)}")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if "train" in splits:
        glue = {"datasets": "nyu-mll/glue"} if metrics.task.glue else {}
        write_model_card(trainer, "\n\n".join(report), dataset, **glue)
    print("\n" + "\n\n".join(report))
    print(f"\nEverything lies in {folder}/")
    for pattern, content in CONTENTS.items():
        if found := ", ".join(sorted(file.name for file in folder.glob(pattern))):
            print(f"  {found:36} {content}")


def check_saved(model: PreTrainedModel, folder: str, texts: list[str]) -> None:
    """Load the saved model in the two ways people do, and see that both answer like the trained one."""
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder).to(model.device).eval()
    classifier = pipeline("text-classification", model=folder, device=model.device)
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**inputs).logits
            torch.testing.assert_close(reloaded(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        probabilities, answer = logits[0].softmax(-1), classifier(text, truncation=True)[0]
        number = model.config.label2id[answer["label"]]
        if number != probabilities.argmax() or abs(probabilities[number] - answer["score"]) > 1e-3:
            raise RuntimeError(f"The pipeline answers {answer}, the trained model {probabilities.tolist()}.")
    print(f"Reloaded by from_pretrained and by pipeline: both agree with the trained model on {len(texts)} texts.")


def classify(file: Path, folder: str, clean: bool) -> None:
    """Print what the saved model thinks of one file."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if clean:
        text = clean_source(text, max_bytes=16384)
    answers = pipeline("text-classification", model=folder)(text, truncation=True, top_k=5)
    print(f"\n{file}" + (" (cleaned like the training texts)" if clean else ""))
    for answer in answers:
        print(f"  {answer['score']:7.3f}  {answer['label']}")
