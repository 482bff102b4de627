"""The recipes of recordings and pictures: what they leave behind, what they learn, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoTokenizer,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from hf_reformer import ReformerConfig
from hf_reformer.data.demo_signals import handwritten_digits, spoken_strings, spoken_tones
from hf_reformer.data.signals import pictures
from hf_reformer.models.frontend import count_frames
from hf_reformer.recipes import audio_classification, image_classification, image_generation, speech_recognition
from hf_reformer.training.model_setup import BackboneArguments
from hf_reformer.training.signals import AudioCollator, AugmentingCollator, vary_picture, vary_recording
from hf_reformer.training.speech import (
    ErrorRates,
    character_tokenizer,
    check_lengths,
    error_rates,
    frames_of,
    vary_speech,
)

soundfile = pytest.importorskip("soundfile")
image_module = pytest.importorskip("PIL.Image")
pd = pytest.importorskip("pandas")

TINY = [
    *("--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1", "--attention_head_size", "16"),
    *("--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"),
    *("--eval_strategy", "no"),
]

EXTRACTOR = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)


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


def check_model_card(folder, scores: dict) -> None:
    """It holds the table of all scores."""
    card = (folder / "README.md").read_text()
    for model, row in scores.items():
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {model} ")]
        assert [float(cell) for cell in line.split("|")[2:-1]] == [round(x, 3) for x in row.values()]


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
    scores = json.loads((sounds / "out" / "scores.json").read_text())["validation"]
    check_model_card(sounds / "out", scores)
    table = pd.read_csv(sounds / "out" / "predictions_validation.csv")
    assert sorted(table["label"]) == ["ba", "ba", "do", "do"]
    assert (table["label"] == table["prediction"]).mean() == scores["Reformer"]["accuracy"]
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
    assert "label" not in table
    classify = pipeline("audio-classification", model=str(sounds / "out"))
    answers = [classify(str(sounds / "train" / "ba" / f"{row}.wav"))[0] for row in range(3)]
    assert table["prediction"].tolist() == [answer["label"] for answer in answers]
    assert table["probability"].tolist() == pytest.approx([answer["score"] for answer in answers], abs=1e-3)
    with pytest.raises(ValueError, match=r"--sampling_rate 44100: .* expects 16000 Hz"):
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
        ({"audio": ["a.wav", "b.wav"]}, ["--sampling_rate", "8000"], r"Row 0: There is no sound file `.*a.wav`"),
        ({"audio": [[1], [2]], "sampling_rate": [8000, None]}, [], "Row 1: There is no sampling rate"),
        ({"audio": [[1], [2]]}, ["--predict_file", "nowhere.wav"], "--predict_file: there is no sound file"),
        ({"melody": [[1], [2]]}, [], r"Which column holds the data.*`melody`.*--audio_column.*train\.parquet"),
    ],
)
def test_recordings_that_cannot_be_used_are_refused_before_training(rows, more, message, tmp_path):
    rows = {"sampling_rate": [8000, 8000], "label": ["a", "b"], **rows}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--train_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out"), *more]
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
    saved = ["--model_name_or_path", str(tmp_path / "out"), "--test_file", str(tmp_path / "train.parquet")]
    with pytest.raises(ValueError, match="without a sampling rate"):  # not heard at the speed of the model
        audio_classification.main([*TINY, *saved, "--output_dir", str(tmp_path / "again")])
    for option, own in (("--frame_ms", 25), ("--stride_ms", 10)):
        with pytest.raises(ValueError, match=rf"{option} 5.0: that of the saved model .* is {own}"):
            audio_classification.main([*TINY, *saved, "--sampling_rate", "8000", option, "5"])


def test_samples_without_a_rate_are_resampled_from_the_rate_that_is_given():
    data = audio_classification.DataArguments(sampling_rate=4000)
    table = Dataset.from_dict({"audio": [np.arange(100, dtype=np.float32)]})
    assert data.encode(table, EXTRACTOR)["length"][:] == [200]
    with pytest.raises(ValueError, match="without a sampling rate"):
        audio_classification.DataArguments().encode(table, EXTRACTOR)


@pytest.mark.parametrize("kind", ["learned", "axial"])
@pytest.mark.parametrize("stride_ms", [10.0, 0.3])
def test_there_is_a_position_for_every_frame_of_varied_recordings(kind, stride_ms):
    """A stride of 0.3 ms is 2.4 samples, rounded to 2."""
    data = speech_recognition.DataArguments(stride_ms=stride_ms)
    sizes = {"hidden_size": 16, "attn_layers": ["local"], "num_attention_heads": 1, "attention_head_size": 16}
    options = BackboneArguments(position_embedding_type=kind, feed_forward_size=16, **sizes)
    encoded = {"train": Dataset.from_dict({"length": [50, 9000]})}
    model = data.hearing_model(AutoModelForCTC, options, None, encoded, EXTRACTOR, vocab_size=5)
    samples = np.zeros(9000, dtype=np.float32)
    longest = max(len(vary_recording(samples, np.random.default_rng(seed), {})) for seed in range(200))
    assert longest > 10000
    with torch.no_grad():
        assert model(torch.zeros(1, longest)).logits.shape[1] <= model.config.covered_positions


def test_recordings_beyond_the_positions_of_a_saved_model_are_refused(tmp_path):
    config = ReformerConfig(
        position_embedding_type="learned", max_position_embeddings=50, hidden_size=16, attn_layers=["local"],
        num_attention_heads=1, attention_head_size=16, feed_forward_size=16, frame_size=200, frame_stride=80,
        frame_transform="spectrum", vocab_size=5,
    )  # fmt: skip
    AutoModelForCTC.from_config(config).save_pretrained(tmp_path)
    options, data = BackboneArguments(model_name_or_path=str(tmp_path)), speech_recognition.DataArguments()
    encoded = {"test": Dataset.from_dict({"length": [6000]})}
    with pytest.raises(ValueError, match=r"has 74 frames, but the model has positions for only 50"):
        data.hearing_model(AutoModelForCTC, options, None, encoded, EXTRACTOR)


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
    check_model_card(speech / "out", json.loads((speech / "out" / "scores.json").read_text())["validation"])


@pytest.mark.slow
def test_made_up_words_are_written_down(tmp_path):
    speech_recognition.main(["--demo", "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["wer"] < 0.5


@pytest.mark.parametrize(
    ("split", "texts", "message"),
    [
        ("train", ["ba", ""], "1 rows of the train data have no transcript; the first is row 1"),
        ("train", ["ba|do", "a"], r"hold '\|'"),
        ("train", ["ba", "b" * 500], r"Row 1 of the train data has a transcript of 500 characters.*train\.parquet"),
        ("validation", ["ba", "b" * 500], r"Row 1 of the validation data has a transcript of 500 .*other\.parquet"),
        ("test", ["b" * 500, "ba"], r"Row 0 of the test data has a transcript of 500 characters.*other\.parquet"),
    ],
)
def test_transcripts_that_cannot_be_used_are_refused_before_training(split, texts, message, tmp_path):
    rows = {"audio": [[1000, -1000] * 400, [1000, -1000] * 410], "sampling_rate": [8000] * 2, "text": texts}
    Dataset.from_dict({**rows, "text": texts if split == "train" else ["ab", "ba"]}).to_parquet(
        tmp_path / "train.parquet"
    )
    Dataset.from_dict(rows).to_parquet(tmp_path / "other.parquet")
    options = ["--train_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out")]
    actions = {"train": [], "validation": ["--do_eval"], "test": ["--do_predict"]}
    options += ["--do_train", *actions[split]]
    options += [] if split == "train" else [f"--{split}_file", str(tmp_path / "other.parquet")]
    with pytest.raises(ValueError, match=message):
        speech_recognition.main([*TINY, *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ids", [[1], [1, 2, 3], [1, 1, 1, 1]])
def test_no_recording_becomes_too_short_for_its_transcript(ids):
    """It has just as many frames as its transcript needs, of which the loss would be infinite with one less."""
    size, stride = 20, 8
    needed = frames_of(ids)
    samples = np.ones(max(1, size + stride * (needed - 2) + 1), dtype=np.float32)
    assert count_frames(len(samples), size, stride) >= needed
    change = vary_speech(size, stride)
    lengths = {len(change(samples, np.random.default_rng(seed), {"labels": ids})) for seed in range(50)}
    assert min(count_frames(length, size, stride) for length in lengths) >= needed
    assert len(lengths) > 1  # and still it is varied


def test_waveforms_are_heard_at_any_loudness_and_features_as_they_are():
    change, waveform = vary_speech(20, 8), np.sin(np.arange(1000, dtype=np.float32))
    gains = [
        change(waveform, np.random.default_rng(seed), {"labels": [1]}).std() / waveform.std() for seed in range(300)
    ]
    assert 1 / 17 < min(gains) < 1 / 13
    assert 3.5 < max(gains) < 4.2
    assert 0.35 < np.mean(np.array(gains) > 0.5) < 0.65
    features = np.full((100, 3), 5.0, dtype=np.float32)
    assert change(features, np.random.default_rng(0), {"labels": [1]}).mean() == pytest.approx(5, abs=0.1)


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


def test_equal_neighbors_need_a_frame_between_them():
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
    check_model_card(digits / "out", json.loads((digits / "out" / "scores.json").read_text())["validation"])
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
    model = AutoModelForImageClassification.from_pretrained(digits / "out").eval()
    assert (model.config.patch_size, model.config.max_position_embeddings) == (2, 16)
    picture = torch.zeros(1, 3, 7, 7)
    picture[..., :2, :2] = 1
    turned = picture.roll((2, 4), dims=(2, 3))  # the same patches, elsewhere
    with torch.no_grad():
        assert model(picture).logits.sub(model(turned).logits).abs().max() > 1e-4
    saved = ["--model_name_or_path", str(digits / "out"), "--test_file", str(digits / "train.parquet")]
    for option, value, own in (("--image_size", "8", "7"), ("--patch_size", "1", "2")):
        with pytest.raises(ValueError, match=rf"{option} {value}: that of the saved model .* is {own}"):
            image_classification.main([*TINY, *saved, option, value])


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
    assert image_module.open(digits / "out" / "drawn.png").size == (240, 120)  # two pictures, side by side
    scores = json.loads((digits / "out" / "scores.json").read_text())["validation"]
    assert set(scores) == {"Reformer", "png", "histogram of every pixel"}
    rows = [json.loads(line) for line in (digits / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    mean = np.mean([row["bits_per_dimension"] for row in rows])
    assert scores["Reformer"]["bits_per_dimension"] == pytest.approx(mean, abs=1e-4)
    saved = ["--model_name_or_path", str(digits / "out"), "--validation_file", str(digits / "validation.parquet")]
    image_generation.main([*TINY, *saved, "--do_eval", "--output_dir", str(digits / "again"), "--draw_samples", "1"])
    again = json.loads((digits / "again" / "scores.json").read_text())["validation"]
    assert again["Reformer"] == pytest.approx(scores["Reformer"])
    with pytest.raises(ValueError, match=r"--image_size 7: that of the saved model .* is 8"):
        image_generation.main([*TINY, *saved, "--do_eval", "--image_size", "7"])
    for unknown in ("--augment", "--label_column"):  # which would do nothing
        with pytest.raises(ValueError, match=f"not used.*{unknown}"):
            image_generation.main([*TINY, *saved, "--do_eval", unknown, "x"])


# --- what is learned, of signals that are easily told apart

LEARNING = [
    *(
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
        "--learning_rate",
        "0.01",
        "--hidden_dropout_prob",
        "0",
    ),
    *("--per_device_train_batch_size", "8"),
]


def scores_of(recipe, rows: Dataset, folder, *more: str) -> dict:
    """Of the Reformer that a recipe trains on these rows, on the rows themselves."""
    rows.to_parquet(folder / "rows.parquet")
    files = ["--train_file", str(folder / "rows.parquet"), "--validation_file", str(folder / "rows.parquet")]
    recipe.main([*TINY, *LEARNING, *files, "--output_dir", str(folder / "out"), *more])
    return json.loads((folder / "out" / "scores.json").read_text())["validation"]["Reformer"]


def tones(*heights: int) -> np.ndarray:
    """Sines of 0.1 s each, one after the other."""
    time = np.arange(800) / 8000
    return np.concatenate([np.sin(2 * np.pi * height * time) for height in heights]).astype(np.float32)


@pytest.mark.usefixtures("undrawn")
def test_tones_are_told_apart(tmp_path):
    heights = [500, 2000] * 8
    rows = {"audio": [tones(x + 5 * i) for i, x in enumerate(heights)], "label": ["low", "high"] * 8}
    rows = Dataset.from_dict({**rows, "sampling_rate": [8000] * 16})
    assert scores_of(audio_classification, rows, tmp_path, "--max_steps", "20")["accuracy"] == 1


@pytest.mark.usefixtures("undrawn")
def test_tones_are_written_down(tmp_path):
    names = {"a": 500, "b": 1500, "c": 3000}
    texts = ["ab", "ba", "ca", "bc", "cb", "ac", "abc", "cab"] * 2
    rows = {"audio": [tones(*(names[x] for x in text)) for text in texts], "text": texts}
    rows = Dataset.from_dict({**rows, "sampling_rate": [8000] * 16})
    frames = ["--frame_ms", "50", "--stride_ms", "50", "--max_steps", "60"]
    assert scores_of(speech_recognition, rows, tmp_path, *frames)["cer"] < 0.1


def test_features_train_predict_and_serve_a_pipeline(speech):
    """Log-mel features, whose extractor is saved: transcripts of the recipe are those of the pipeline, at any rate."""
    options = ["--train_file", str(speech / "train.parquet"), "--validation_file", str(speech / "validation.parquet")]
    options += ["--output_dir", str(speech / "out"), "--max_steps", "8", "--baselines", "--features", "log_mel"]
    options += ["--frame_ms", "40", "--stride_ms", "40"]
    speech_recognition.main([*TINY, *LEARNING, *options])
    model = AutoModelForCTC.from_pretrained(speech / "out")
    assert (model.config.num_input_features, model.config.frame_size, model.config.frame_stride) == (80, 4, 4)
    rows = [json.loads(line) for line in (speech / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    listen = pipeline("automatic-speech-recognition", model=str(speech / "out"))
    for row, samples in zip(rows, spoken_strings(8, 3)["validation"]["audio"][:], strict=True):
        heard = listen({"raw": np.asarray(samples, dtype=np.float32), "sampling_rate": 8000})["text"]
        assert " ".join(heard.split()) == row["predicted"]
    assert any(row["predicted"] for row in rows)
    for option in ({"chunk_length_s": 1}, {"return_timestamps": "char"}):
        with pytest.raises(ValueError, match="counts samples, but each input feature of this model"):
            listen(np.zeros(16000, dtype=np.float32), **option)
    saved = ["--model_name_or_path", str(speech / "out"), "--test_file", str(speech / "validation.parquet")]
    speech_recognition.main([*TINY, *saved, "--output_dir", str(speech / "again")])
    again = [json.loads(line) for line in (speech / "again" / "predictions_test.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in again] == [row["predicted"] for row in rows]
    with pytest.raises(ValueError, match=r"--features waveform: that of the saved model .* is log_mel"):
        speech_recognition.main([*TINY, *saved, "--features", "waveform"])


@pytest.mark.usefixtures("undrawn")
def test_features_of_tones_are_told_apart(tmp_path):
    heights = [500, 2000] * 8
    rows = {"audio": [tones(x + 5 * i) for i, x in enumerate(heights)], "label": ["low", "high"] * 8}
    rows = Dataset.from_dict({**rows, "sampling_rate": [8000] * 16})
    options = ["--max_steps", "20", "--features", "log_mel", "--position_embedding_type", "learned"]
    assert scores_of(audio_classification, rows, tmp_path, *options)["accuracy"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--frame_transform", "spectrum"], "--features log_mel are spectra"),
        (["--stride_ms", "40"], "--stride_ms 40 is more than --frame_ms 10"),
        (["--frame_ms", "25"], "--frame_ms 25: log_mel features are 10 ms apart"),
        (["--gain_ms", "1000"], "--gain_ms 1000 is for waveforms, not --features log_mel"),
        *(([f"--gain_ms={ms}"], f"--gain_ms {ms}: loudness cannot be measured") for ms in ("-5", "2", "nan", "inf")),
        (["--sampling_rate", "8000"], "--sampling_rate 8000: log_mel expects 16000 Hz"),
        ([], "Row 1: The recording is shorter than 25 ms"),
    ],
)
def test_features_that_cannot_be_are_refused(more, message, tmp_path):
    rows = {"audio": [np.zeros(8000), np.zeros(100)], "sampling_rate": [8000] * 2, "label": ["a", "b"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--do_train", "--train_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        audio_classification.main([*TINY, *options, "--features", "log_mel", *more])


@pytest.mark.usefixtures("undrawn")
def test_dark_and_bright_pictures_are_told_apart_and_drawn(tmp_path):
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 20, 16) + (200 if row % 2 else 0) for row in range(16)]
    rows = Dataset.from_dict({"pixels": pixels, "label": ["dark", "bright"] * 8})
    (tmp_path / "classes").mkdir()
    assert scores_of(image_classification, rows, tmp_path / "classes", "--max_steps", "20")["accuracy"] == 1
    bits = scores_of(image_generation, rows, tmp_path, "--max_steps", "60", "--draw_samples", "1")
    assert bits["bits_per_dimension"] < 6  # of 8, and of the 5.3 that 40 values have
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    drawn = image_generation.draw_pictures(model, 8, (4, 4))
    assert drawn.shape == (8, 4, 4)
    assert np.mean((drawn < 20) | ((drawn >= 200) & (drawn < 220))) > 0.8  # at random: 0.16


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
    change = vary_picture((3, 28, 28), move=True, flip=True)
    places = set()
    for seed in range(60):
        moved = change(picture.reshape(-1), np.random.default_rng(seed), {}).reshape(3, 28, 28)
        assert (moved.sum((1, 2)) == 1).all()
        places.add(tuple(int(x) for x in np.argwhere(moved[0])[0]))
    assert {row for row, _ in places} == {8, 9, 10, 11, 12}
    assert {column for _, column in places} == {6, 7, 8, 9, 10, 17, 18, 19, 20, 21}
    still = vary_picture((3, 28, 28), move=False, flip=True)
    found = [still(picture.reshape(-1), np.random.default_rng(seed), {}).reshape(3, 28, 28) for seed in range(20)]
    assert {tuple(np.argwhere(x[0])[0].tolist()) for x in found} == {(10, 8), (10, 19)}


def test_batches_of_recordings_are_padded_at_their_ends():
    collate = AudioCollator(Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True))
    rows = [{"input_values": [1.0, 2.0], "labels": [3]}, {"input_values": [1.0, 2.0, 3.0], "labels": [4, 5]}]
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[3, -100], [4, 5]]
    assert batch["input_values"].dtype == torch.float32
