"""Train a Reformer to transcribe recordings of any length, with connectionist temporal classification (CTC).

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train speech-recognition --demo

    # your own recordings: csv, jsonl or parquet with transcripts and file names, or samples with their sampling_rate,
    # or `datasets.Audio`
    hf-reformer train speech-recognition --train_file train.csv --validation_file validation.csv --text_column text

    # a model saved by one of these runs: train it further, or only transcribe
    hf-reformer train speech-recognition --model_name_or_path runs/speech --train_file more.parquet
    hf-reformer train speech-recognition --model_name_or_path runs/speech --predict_file lecture.wav

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)

from ..data.columns import check_columns, labels_unknown
from ..data.demo_signals import spoken_strings
from ..data.tables import cell_text, read_column
from ..models.frontend import count_frames
from ..training.model_setup import SAVED_MODEL, BackboneArguments, load_trained, option, run_recipe
from ..training.reports import format_tables, write_report, write_rows
from ..training.signal_options import AudioArguments
from ..training.signals import AudioCollator, AugmentingCollator, SignalTrainer, mean_spectra, steps_per_second
from ..training.speech import (
    ErrorRates,
    character_tokenizer,
    check_lengths,
    draw_heard,
    error_rates,
    label_ids,
    likeliest,
    nearest_recordings,
    normalized,
    vary_speech,
)
from ..training.trainers import build_trainer, longest_first, predict_splits, train_and_save

DEFAULTS = {
    "output_dir": "runs/speech", "train_sampling_strategy": "group_by_length",
    "attn_layers": ["local", "lsh", "local", "local"], "hidden_dropout_prob": 0.1, "num_train_epochs": 20,
    "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-speech", "baselines": True, "num_train_epochs": 16, "attn_layers": ["local", "local"],
    "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128, "eval_strategy": "no", "augment": False,
    "config_overrides": "local_window=32",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {**SAVED_MODEL, "--demo": DEMO}
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text", "label")
NO_TEXTS = "To transcribe recordings without transcripts, give them as --test_file."


@dataclass
class DataArguments(AudioArguments):
    """Where the recordings come from."""

    sources = ("demo",)

    demo: bool = option(False, "Complete run without a download: transcribe synthetic words.")
    text_column: str | None = option(None, "Transcripts. Default: found by name.")

    def read_source(self) -> Mapping[str, Dataset]:
        return spoken_strings() if self.demo else super().read_source()

    def describe(self) -> str:
        return "made-up words" if self.demo else super().describe()


def load_splits(args: DataArguments, seed: int) -> DatasetDict:
    """Read the splits, with a column `transcript` if there are transcripts."""
    splits = args.read()
    for split, part in splits.items():
        with args.naming_source(split):
            names = part.column_names
            text = args.text_column or next((name for name in TEXT_COLUMNS if name in names), None)
            if text is None and not split.startswith("test"):
                raise ValueError(
                    f"Which column holds the transcript? The columns are {names}. Name it with --text_column."
                )
            if text is not None and not split.startswith("test"):
                check_columns(part, split, [text], NO_TEXTS)
            if text in names:
                cells = read_column(part, text)
                if not labels_unknown(split, cells):
                    splits[split] = _with_transcripts(part, cells, split)
    return args.complete(splits, seed)


def _with_transcripts(part: Dataset, cells: list[Any], split: str) -> Dataset:
    texts = [normalized(cell_text(cell) or "") for cell in cells]
    if empty := [row for row, text in enumerate(texts) if not text]:
        raise ValueError(
            f"{len(empty)} rows of the {split} data have no transcript; the first is row {empty[0]}. Leave such rows "
            f"out. {NO_TEXTS}"
        )
    if "transcript" in part.column_names:
        part = part.remove_columns("transcript")
    return part.add_column("transcript", texts)


class SaveTokenizer(TrainerCallback):
    """Saves the tokenizer along with the feature extractor in every checkpoint."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.tokenizer.save_pretrained(folder)


def report(
    trainer: Trainer, rates: ErrorRates, splits: DatasetDict, encoded: Mapping[str, Dataset], args: DataArguments,
    rate: int,
) -> None:  # fmt: skip
    """Write transcripts, plots and error rates of all splits except the training data, with baselines."""
    folder, tables, trained = Path(str(trainer.args.output_dir)), {}, "train" in splits
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    features = mean_spectra(max(2, round(rate * 0.025)))
    for split, frames in predict_splits(trainer, encoded):
        part, frames = splits[split], np.asarray(frames)
        found = rates.texts(frames)
        known = read_column(part, "transcript") if "transcript" in part.column_names else None
        rows = (
            {"row": row, **({"true": known[row]} if known else {}), "predicted": text}
            for row, text in enumerate(found)
        )
        write_rows(folder / f"predictions_{split}.jsonl", rows)
        ordered = encoded[split].select(np.argsort(read_column(encoded[split], "row")))
        draw_heard(
            folder / f"heard_{split}.png", ordered, frames, known or [None] * len(part), rates.tokenizer, rate,
            model.config.frame_stride, f"{split}: recognized characters over time",
        )  # fmt: skip
        if known:
            tables[split] = {"Reformer": error_rates(known, found)}
            if args.baselines and trained:
                texts = read_column(splits["train"], "transcript")
                tables[split]["silence"] = error_rates(known, [""] * len(known))
                nearest = nearest_recordings(encoded["train"], ordered, texts, features)
                tables[split]["most alike of train"] = error_rates(known, nearest)
    write_report(trainer, tables, format_tables(tables, splits, "recordings"), args.describe() if trained else None)


def predict_files(data: DataArguments, folder: str, args: TrainingArguments) -> None:
    """Print the transcripts of sound files, each read in one pass."""
    model = load_trained(AutoModelForCTC, folder)
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    listen = pipeline("automatic-speech-recognition", model=model, feature_extractor=extractor, tokenizer=tokenizer)
    for file in data.files_to_predict():
        print(f"\n{file}\n  {normalized(listen(file)['text'])}")


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the data"):
        splits = load_splits(data, args.seed)
        trains = "train" in splits
        extractor = data.extractor(model_args, next(iter(splits.values())))
        if model_args.model_name_or_path is not None:
            tokenizer: Any = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        else:
            tokenizer = character_tokenizer(read_column(splits["train"], "transcript"))
        frame = data.frame_fields(model_args, extractor)
        framing = (frame["frame_size"], frame["frame_stride"])
        encoded = {}
        for split, part in splits.items():
            known = (
                {"labels": label_ids(tokenizer, read_column(part, "transcript"))}
                if "transcript" in part.column_names
                else {}
            )
            with data.naming_source(split):
                rows = data.encode(part, extractor, known)
                if known:
                    frames = [count_frames(int(length), *framing) for length in read_column(rows, "length")]
                    check_lengths(known["labels"], frames, split)
            encoded[split] = rows if split == "train" else longest_first(rows)
    model = data.hearing_model(AutoModelForCTC, model_args, tokenizer, encoded, extractor)
    rates, collate = ErrorRates(tokenizer), AudioCollator(extractor)
    vary, name, width = vary_speech(*framing), extractor.model_input_names[0], extractor.feature_size
    augmenting = AugmentingCollator(collate, name, vary, args.seed, width) if data.augment else None
    callbacks: list[Any] = [SaveTokenizer(tokenizer), *([augmenting] if augmenting else [])]
    options = {"data_collator": collate, "compute_metrics": rates, "callbacks": callbacks}
    options["preprocess_logits_for_metrics"] = likeliest
    trainer = build_trainer(SignalTrainer, model, args, extractor, encoded, **options)
    trainer.augmenting = augmenting
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    seconds = np.mean(read_column(next(iter(encoded.values())), "length")) / steps_per_second(extractor)
    train_and_save(
        trainer,
        f"Recordings: {counts}; {seconds:.2f} s on average, {extractor.sampling_rate} Hz; {len(tokenizer)} characters",
    )
    if trains and trainer.is_world_process_zero():
        tokenizer.save_pretrained(str(args.output_dir))
    report(trainer, rates, splits, encoded, data, steps_per_second(extractor))
    return trains


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    run_recipe("speech-recognition", __doc__, classes, run, arguments, DEFAULTS, PRESETS, predict_files)
