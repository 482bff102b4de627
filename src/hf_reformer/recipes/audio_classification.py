"""Train a Reformer to classify recordings of any length (words, sounds, speakers) from their samples.

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train audio-classification --demo

    # your own recordings: a folder with one sub-folder of audio files per label; or csv, jsonl, parquet with a column
    # of file names, of samples with their sampling_rate, or of `datasets.Audio`
    hf-reformer train audio-classification --train_file words/train --validation_file words/validation --baselines

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train audio-classification --model_name_or_path runs/audio --train_file more.parquet
    hf-reformer train audio-classification --model_name_or_path runs/audio --predict_file recording.wav

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    TrainingArguments,
    pipeline,
    set_seed,
)

from ..data.demo_signals import spoken_tones
from ..data.tables import read_column
from ..training.classification import Metrics, label_fields, shortened, task_of_model
from ..training.model_setup import SAVED_MODEL, BackboneArguments, load_trained, option, run_recipe
from ..training.signal_classes import label_columns, label_splits, report_classes
from ..training.signal_options import AudioArguments, LabelArguments
from ..training.signals import (
    AudioCollator,
    AugmentingCollator,
    SignalTrainer,
    mean_spectra,
    steps_per_second,
    vary_recording,
)
from ..training.trainers import build_trainer, longest_first, train_and_save

DEFAULTS = {
    "output_dir": "runs/audio", "train_sampling_strategy": "group_by_length", "attn_layers": ["local", "lsh", "local"],
    "hidden_dropout_prob": 0.1, "num_train_epochs": 40, "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-audio", "baselines": True, "num_train_epochs": 12, "attn_layers": ["local", "lsh"],
    "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128, "eval_strategy": "no",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {**SAVED_MODEL, "--demo": DEMO}


@dataclass
class DataArguments(AudioArguments, LabelArguments):
    """Where the recordings come from."""

    sources = ("demo",)

    demo: bool = option(False, "Complete run without a download: classify ten synthetic words.")
    train_file: str | None = option(
        None, "csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of audio files per label."
    )

    def read_source(self) -> Mapping[str, Dataset]:
        return spoken_tones() if self.demo else super().read_source()

    def describe(self) -> str:
        return "made-up words" if self.demo else super().describe()


def predict_files(data: DataArguments, folder: str, args: TrainingArguments) -> None:
    """Print the most probable labels of sound files."""
    model = load_trained(AutoModelForAudioClassification, folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    classifier = pipeline("audio-classification", model=model, feature_extractor=extractor)
    for file in data.files_to_predict():
        print(f"\n{file}")
        for answer in classifier(file, top_k=5):
            print(f"  {answer['score']:7.3f}  {answer['label']}")


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    model_labels, model_problem_type = task_of_model(model_args.model_name_or_path)
    with args.main_process_first(desc="preparing the data"):
        splits, task = label_splits(data, model_labels, args.seed, model_problem_type)
        extractor = data.extractor(model_args, next(iter(splits.values())))
        encoded = {}
        for split, part in splits.items():
            with data.naming_source(split):
                rows = data.encode(part, extractor, label_columns(part))
            encoded[split] = rows if split == "train" else longest_first(rows)
    metrics, trains, fields = Metrics(task, None), "train" in splits, label_fields(task)
    model = data.hearing_model(AutoModelForAudioClassification, model_args, None, encoded, extractor, **fields)
    collate = AudioCollator(extractor)
    rate, name, width = extractor.sampling_rate, extractor.model_input_names[0], extractor.feature_size
    augmenting = AugmentingCollator(collate, name, vary_recording, args.seed, width) if data.augment else None
    options = {"data_collator": collate, "compute_metrics": metrics, "callbacks": [augmenting] if augmenting else None}
    trainer = build_trainer(SignalTrainer, model, args, extractor, encoded, **options)
    trainer.augmenting = augmenting
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    seconds = np.mean(read_column(next(iter(encoded.values())), "length")) / steps_per_second(extractor)
    labels = shortened(task.label_names) if task.label_names else task.problem_type
    train_and_save(trainer, f"Recordings: {counts}; {seconds:.2f} s on average, {rate} Hz. Labels: {labels}")
    features = mean_spectra(round(rate * 0.025) or 1)
    report_classes(trainer, metrics, splits, encoded, data, "recordings", features, "spectra + support vectors")
    return trains


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    run_recipe("audio-classification", __doc__, classes, run, arguments, DEFAULTS, PRESETS, predict_files)
