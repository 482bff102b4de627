"""The recipes of recordings and pictures: what they leave behind, what they learn, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoTokenizer, pipeline

from hf_reformer.data.demo_signals import handwritten_digits, spoken_strings, spoken_tones
from hf_reformer.data.signals import pictures
from hf_reformer.recipes import audio_classification, image_classification, image_generation, speech_recognition
from hf_reformer.training.signals import AudioCollator, AugmentingCollator, vary_picture, vary_recording
from hf_reformer.training.speech import ErrorRates, character_tokenizer, check_lengths, error_rates

soundfile = pytest.importorskip("soundfile")
pd = pytest.importorskip("pandas")
pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1", "--attention_head_size", "16"),
    *("--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"),
    *("--eval_strategy", "no"),
]


def wav(path, word: int, seed: int, rate: int = 8000) -> None:
    samples = spoken_tones(word + 1, 1)["train"]["audio"][word][: 800 + seed]
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate)


@pytest.fixture
def sounds(tmp_path):
    """A folder with a sub-folder of sound files for each of two words."""
    for word, name in ((0, "ba"), (1, "do")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for row in range(6):
            wav(tmp_path / "train" / name / f"{row}.wav", word, row, rate=8000 if row else 16000)
    return tmp_path


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- audio classification


def test_a_folder_of_sounds_trains_predicts_and_serves_a_pipeline(sounds, capsys):
    options = ["--train_file", str(sounds / "train"), "--output_dir", str(sounds / "out"), "--max_steps", "2"]
    options += ["--validation_fraction", "0.34", "--baselines", "--predict_file", str(sounds / "train" / "ba")]
    options += ["--sampling_rate", "16000"]
    audio_classification.main([*TINY, *options])
    printed = capsys.readouterr().out
    assert "train 8, validation 4" in printed
    assert "16000 Hz" in printed  # to which most are resampled
    assert "| spectra + support vectors |" in printed
    assert printed.count(".wav\n") == 6
    left = files(sounds / "out")
    assert {"preprocessor_config.json", "README.md", "scores.json", "confusion_matrix_validation.png"} <= left
    table = pd.read_csv(sounds / "out" / "predictions_validation.csv")
    assert sorted(table["label"]) == ["ba", "ba", "do", "do"]
    classify = pipeline("audio-classification", model=str(sounds / "out"))
    for path, prediction, probability in zip(table["path"], table["prediction"], table["probability"], strict=True):
        best = classify(path)[0]
        assert best["label"] == prediction
        assert best["score"] == pytest.approx(probability, abs=1e-3)


def test_a_saved_model_predicts_a_test_file_without_labels(sounds):
    options = ["--train_file", str(sounds / "train"), "--sampling_rate", "16000", "--max_steps", "1"]
    audio_classification.main([*TINY, *options, "--output_dir", str(sounds / "out")])
    Dataset.from_dict({"path": [f"train/ba/{row}.wav" for row in range(3)]}).to_csv(sounds / "test.csv")
    saved = ["--model_name_or_path", str(sounds / "out"), "--test_file", str(sounds / "test.csv")]
    audio_classification.main([*TINY, *saved, "--output_dir", str(sounds / "again")])
    table = pd.read_csv(sounds / "again" / "predictions_test.csv")
    assert len(table) == 3
    assert "label" not in table
    with pytest.raises(ValueError, match=r"--sampling_rate 44100: .* hears 16000 Hz"):
        audio_classification.main([*TINY, *saved, "--sampling_rate", "44100", "--output_dir", str(sounds / "again")])


@pytest.mark.slow
def test_made_up_words_are_learnt(tmp_path):
    audio_classification.main(["--demo", "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ({"audio": [[1, 2], []]}, [], r"Row 1: .*empty.*\(This is `.*train.parquet`"),
        ({"audio": [[0.1, float("nan")], [0.1]]}, [], "Row 0: .*NaN"),
        ({"audio": [[1], [2]]}, ["--audio_column", "sound"], "no column `sound`"),
        ({"audio": [[1], [2]], "sampling_rate": [0, 0]}, [], "Sampling rates of 0"),
        ({"audio": [[1], [2]]}, ["--stride_ms", "30", "--frame_ms", "20"], "--stride_ms 30 is more than"),
        ({"audio": ["a.wav", "b.wav"]}, ["--sampling_rate", "8000"], "Row 0: There is no sound file `a.wav`"),
        ({"audio": [[1], [2]]}, ["--predict_file", "nowhere.wav"], "--predict_file: there is no sound file"),
        ({"sound": [[1], [2]]}, [], "Which column holds|no column|sound"),
    ],
)
def test_recordings_that_cannot_be_used_are_refused_before_training(rows, more, message, tmp_path):
    rows = {"sampling_rate": [8000, 8000], "label": ["a", "b"], **rows}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--train_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out"), *more]
    if "sound" in rows:
        options += ["--audio_column", "text"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        audio_classification.main([*TINY, "--do_train", *options])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_samples_without_a_rate_need_one(tmp_path):
    rows = {"audio": [[1, 2, 3], [3, 4, 5]] * 2, "label": ["a", "b"] * 2}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    options = [*TINY, "--do_train", "--train_file", str(tmp_path / "train.parquet"), "--max_steps", "1"]
    options += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="without a sampling rate"):
        audio_classification.main(options)
    audio_classification.main([*options, "--sampling_rate", "8000"])


def test_a_resumed_run_ends_where_the_whole_one_does(sounds):
    """Varied training data, too."""
    options = [*TINY, "--do_train", "--train_file", str(sounds / "train"), "--num_train_epochs", "2"]
    options += ["--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "2"]
    audio_classification.main([*options, "--output_dir", str(sounds / "whole")])
    shutil.copytree(sounds / "whole" / "checkpoint-4", sounds / "part" / "checkpoint-4")
    resume = ["--resume_from_checkpoint", "last"]
    audio_classification.main([*options, *resume, "--output_dir", str(sounds / "part")])
    whole, part = (load_file(sounds / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(weight, part[name]) for name, weight in whole.items())


# --- speech recognition


@pytest.fixture
def speech(tmp_path):
    splits = spoken_strings(8, 3)
    for split, rows in splits.items():
        rows.to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def test_transcripts_of_the_recipe_are_those_of_the_pipeline(speech, capsys):
    options = ["--train_file", str(speech / "train.parquet"), "--validation_file", str(speech / "validation.parquet")]
    soundfile.write(speech / "one.wav", np.array(spoken_strings(1, 1)["train"]["audio"][0]), 8000)
    options += ["--output_dir", str(speech / "out"), "--max_steps", "2", "--baselines"]
    speech_recognition.main([*TINY, *options, "--predict_file", str(speech / "one.wav")])
    printed = capsys.readouterr().out
    assert "| most alike of train |" in printed
    assert "one.wav\n  " in printed
    assert {"heard_validation.png", "vocab.json", "preprocessor_config.json"} <= files(speech / "out")
    tokenizer = AutoTokenizer.from_pretrained(speech / "out")
    model = AutoModelForCTC.from_pretrained(speech / "out")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = [json.loads(line) for line in (speech / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    truth = spoken_strings(8, 3)["validation"]
    assert [row["true"] for row in rows] == truth["text"][:]
    listen = pipeline("automatic-speech-recognition", model=str(speech / "out"))
    for row, samples in zip(rows, truth["audio"][:], strict=True):
        heard = listen({"raw": np.asarray(samples, dtype=np.float32), "sampling_rate": 8000})["text"]
        assert " ".join(heard.split()) == row["predicted"]
    scores = json.loads((speech / "out" / "scores.json").read_text())["validation"]["Reformer"]
    assert scores == pytest.approx(error_rates([x["true"] for x in rows], [x["predicted"] for x in rows]))


@pytest.mark.slow
def test_made_up_words_are_written_down(tmp_path):
    speech_recognition.main(["--demo", "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["wer"] < 0.5


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ba", ""], "1 rows of the train data have no transcript; the first is row 1"),
        (["ba|do", "a"], r"hold '\|'"),
        (["ba", "b" * 500], "Row 1 of the train data has a transcript of 500 characters"),
    ],
)
def test_transcripts_that_cannot_be_used_are_refused_before_training(texts, message, tmp_path):
    rows = {"audio": [[1000, -1000] * 400] * 2, "sampling_rate": [8000] * 2, "text": texts}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--do_train", "--train_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        speech_recognition.main([*TINY, *options])


def test_the_tokenizer_of_characters_writes_and_reads():
    tokenizer = character_tokenizer(["ab ba", "süß"])
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("ab süß")["input_ids"]
    assert 0 not in ids
    rates = ErrorRates(tokenizer)
    frames = np.array([[i for token in ids for i in (0, token, token)] + [-100, -100]])
    assert rates.texts(frames) == ["ab süß"]
    assert rates.references(np.array([[*ids, -100]])) == ["ab süß"]
    assert rates.references(np.array([tokenizer("aabb")["input_ids"]])) == ["aabb"]  # letters are not merged


def test_error_rates_by_hand():
    found = error_rates(["one two three", "four"], ["one three", "five four"])
    assert found["wer"] == pytest.approx(2 / 4)
    assert found["cer"] == pytest.approx((4 + 5) / 17)
    assert found["exact"] == 0
    assert error_rates(["a"], [""]) == {"wer": 1.0, "cer": 1.0, "exact": 0.0}


def test_equal_neighbours_need_a_frame_between_them():
    check_lengths([[1, 1]], [3], "train")
    with pytest.raises(ValueError, match=r"2 characters.*only 2 frames"):
        check_lengths([[1, 1]], [2], "train")


# --- pictures


@pytest.fixture
def digits(tmp_path):
    for split, rows in handwritten_digits().items():
        rows.select(range(30 if split == "train" else 6)).to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def test_pixels_train_predict_and_serve_a_pipeline(digits):
    options = ["--train_file", str(digits / "train.parquet"), "--validation_file", str(digits / "validation.parquet")]
    options += ["--output_dir", str(digits / "out"), "--max_steps", "2", "--baselines", "--flip"]
    next(pictures(handwritten_digits()["train"], "pixels")).save(digits / "one.png")
    options += ["--predict_file", str(digits / "one.png")]
    image_classification.main([*TINY, *options])
    assert {"preprocessor_config.json", "confusion_matrix_validation.png", "README.md"} <= files(digits / "out")
    config = json.loads((digits / "out" / "config.json").read_text())
    assert config["rotary_shape"] == [8, 8]
    table = pd.read_csv(digits / "out" / "predictions_validation.csv")
    classify = pipeline("image-classification", model=str(digits / "out"))
    rows = handwritten_digits()["validation"].select(range(6))
    for image, prediction, probability in zip(
        pictures(rows, "pixels"), table["prediction"], table["probability"], strict=True
    ):
        best = classify(image)[0]
        assert best["label"] == str(prediction)
        assert best["score"] == pytest.approx(probability, abs=1e-3)


@pytest.mark.parametrize("kind", ["axial", "learned", "rotary"])
def test_patches_and_other_positions(kind, digits):
    options = ["--train_file", str(digits / "train.parquet"), "--output_dir", str(digits / "out"), "--max_steps", "1"]
    options += ["--patch_size", "2", "--image_size", "7", "--position_embedding_type", kind]
    image_classification.main([*TINY, *options])
    config = json.loads((digits / "out" / "config.json").read_text())
    assert (config["patch_size"], config["max_position_embeddings"]) == (2, 16)


@pytest.mark.slow
def test_handwritten_digits_are_learnt(tmp_path):
    image_classification.main(["--demo", "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["accuracy"] > 0.8


@pytest.mark.parametrize("kind", ["rotary", "axial"])
def test_bits_per_dimension_and_pictures_that_are_drawn(kind, digits):
    options = ["--train_file", str(digits / "train.parquet"), "--validation_file", str(digits / "validation.parquet")]
    options += ["--output_dir", str(digits / "out"), "--max_steps", "2", "--baselines", "--draw_samples", "2"]
    options += ["--position_embedding_type", kind]
    image_generation.main([*TINY, *options])
    assert {"drawn.png", "predictions_validation.jsonl"} <= files(digits / "out")
    scores = json.loads((digits / "out" / "scores.json").read_text())["validation"]
    assert set(scores) == {"Reformer", "png", "histogram of every pixel"}
    rows = [json.loads(line) for line in (digits / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    mean = np.mean([row["bits_per_dimension"] for row in rows])
    assert scores["Reformer"]["bits_per_dimension"] == pytest.approx(mean, abs=1e-4)
    saved = ["--model_name_or_path", str(digits / "out"), "--validation_file", str(digits / "validation.parquet")]
    image_generation.main([*TINY, *saved, "--do_eval", "--output_dir", str(digits / "again"), "--draw_samples", "1"])
    again = json.loads((digits / "again" / "scores.json").read_text())["validation"]
    assert again["Reformer"] == pytest.approx(scores["Reformer"])


def test_a_histogram_gives_the_bits_of_its_own_data():
    train = np.array([[0, 5], [0, 5], [0, 6], [0, 6]])
    found = image_generation.baseline_bits(train, train, (1, 2))["histogram of every pixel"]["bits_per_dimension"]
    assert found == pytest.approx(0.5 * (-np.log2((4 + 1 / 256) / 5) - np.log2((2 + 1 / 256) / 5)))


# --- changes of training data


def test_what_is_changed_depends_on_row_epoch_and_seed_alone():
    class Keep:
        def __call__(self, rows):
            return rows

    rows = [{"input_values": np.arange(50, dtype=np.float32)}, {"input_values": np.ones(30, dtype=np.float32)}]
    collate = AugmentingCollator(Keep(), "input_values", vary_recording, seed=3)
    first = collate(rows)
    assert all(np.array_equal(a["input_values"], b["input_values"]) for a, b in zip(first, collate(rows), strict=True))
    alone = collate(rows[1:])
    assert np.array_equal(alone[0]["input_values"], first[1]["input_values"])
    collate.epoch = 1
    assert not np.array_equal(collate(rows)[0]["input_values"], first[0]["input_values"])
    assert np.array_equal(rows[0]["input_values"], np.arange(50))  # the data stay


def test_a_picture_moves_and_is_mirrored():
    picture = np.zeros((3, 28, 28), dtype=np.float32)
    picture[:, 10, 8] = 1
    change = vary_picture((3, 28, 28), flip=True)
    places = set()
    for seed in range(60):
        moved = change(picture.reshape(-1), np.random.default_rng(seed)).reshape(3, 28, 28)
        assert (moved.sum((1, 2)) == 1).all()
        places.add(tuple(int(x) for x in np.argwhere(moved[0])[0]))
    assert {row for row, _ in places} == {8, 9, 10, 11, 12}
    assert {column for _, column in places} == {6, 7, 8, 9, 10, 17, 18, 19, 20, 21}


def test_batches_of_recordings_are_padded_at_their_ends():
    from transformers import Wav2Vec2FeatureExtractor

    collate = AudioCollator(Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True))
    rows = [{"input_values": [1.0, 2.0], "labels": [3]}, {"input_values": [1.0, 2.0, 3.0], "labels": [4, 5]}]
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[3, -100], [4, 5]]
    assert batch["input_values"].dtype == torch.float32
