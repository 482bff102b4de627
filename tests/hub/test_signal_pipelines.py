"""Sound and pictures in transformers' own pipelines: files, arrays and other sampling rates, without ffmpeg."""

import io
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL_WINDOWS, make_model
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    pipeline,
)
from transformers.models.vit import ViTImageProcessorPil

from hf_reformer import ReformerForAudioClassification, ReformerForCTC, ReformerForImageClassification
from hf_reformer.hub import export
from hf_reformer.hub.audio import resampled, waveform
from hf_reformer.hub.signal_pipelines import AudioClassification, SpeechRecognition

soundfile = pytest.importorskip("soundfile")
image_module = pytest.importorskip("PIL.Image")

RATE = 8000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / RATE)).astype(np.float32)
FRAMES = {"frame_size": 160, "frame_stride": 80, **SMALL_WINDOWS}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder of a CTC model, as the recipe leaves it."""
    folder = tmp_path_factory.mktemp("speech")
    vocab = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: i + 3 for i, letter in enumerate("abcdefgh")}}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": None, "eos_token": None}
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **names).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    make_model(ReformerForCTC, dtype=torch.float32, vocab_size=11, **FRAMES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    make_model(ReformerForAudioClassification, dtype=torch.float32, num_labels=3, **FRAMES).save_pretrained(folder)
    return folder


def written(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


# --- pipelines


def test_speech_recognition_of_files_arrays_and_lists(speech, tmp_path):
    listen = pipeline("automatic-speech-recognition", model=str(speech))
    assert type(listen) is SpeechRecognition
    expected = listen(TONE)
    file = tmp_path / "tone.wav"
    file.write_bytes(written(TONE))
    stereo = written(np.stack([TONE, TONE], axis=1))
    for same in (str(file), file.read_bytes(), stereo, {"raw": TONE, "sampling_rate": RATE}, torch.from_numpy(TONE)):
        assert listen(same) == expected
    together = listen([str(file), TONE[:1000], str(file)], batch_size=3)
    assert together == [expected, listen(TONE[:1000]), expected]
    pieces = listen(TONE, return_timestamps="char")["chunks"]
    assert all(0 <= piece["timestamp"][0] < piece["timestamp"][1] <= 0.51 for piece in pieces)


def test_audio_classification_of_files_arrays_and_lists(audio, tmp_path):
    classify = pipeline("audio-classification", model=str(audio))
    assert type(classify) is AudioClassification
    expected = classify(TONE)
    assert len(expected) == 3
    (tmp_path / "tone.flac").write_bytes(written(TONE, kind="FLAC", subtype="PCM_24"))
    found = classify([str(tmp_path / "tone.flac"), {"array": TONE, "sampling_rate": RATE}], batch_size=2)
    for answer in found:
        assert [x["label"] for x in answer] == [x["label"] for x in expected]
        assert [x["score"] for x in answer] == pytest.approx([x["score"] for x in expected], abs=1e-4)


def test_other_sampling_rates_sound_the_same(speech):
    """Of another rate, the frames of a tone are nearly those of its own."""
    listen = pipeline("automatic-speech-recognition", model=str(speech))
    at_16k = (0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)).astype(np.float32)
    heard = listen.feature_extractor(waveform({"raw": at_16k, "sampling_rate": 16000}, RATE), sampling_rate=RATE)
    own = listen.feature_extractor(TONE, sampling_rate=RATE)
    a, b = (np.asarray(x["input_values"][0]) for x in (heard, own))
    assert a.shape == b.shape
    assert np.abs(a - b)[200:-200].max() < 0.02
    assert isinstance(listen({"raw": at_16k, "sampling_rate": 16000, "stride": (0, 800)})["text"], str)


def test_a_recording_of_a_minute_is_transcribed_in_one_pass(speech):
    listen = pipeline("automatic-speech-recognition", model=str(speech))
    rows = []
    forward = listen.model.forward
    listen.model.forward = lambda **inputs: (rows.append(inputs["input_values"].shape), forward(**inputs))[1]
    listen(np.tile(TONE, 120))
    assert rows == [(1, 480_000)]


def test_processors_are_those_of_the_library(speech, audio):
    for folder in (speech, audio):
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        assert type(extractor) is Wav2Vec2FeatureExtractor
        assert (extractor.sampling_rate, extractor.return_attention_mask) == (RATE, True)


def test_models_of_others_go_their_usual_way():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    sizes |= {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 1}
    config = transformers.Wav2Vec2Config(**sizes)
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
    assert len(classify(TONE)) == 2
    with pytest.raises(ValueError, match=r"ffmpeg|[Mm]alformed"):
        classify(b"no sound")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_pictures_of_every_mode_and_size(mode, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 6, "width": 5}, do_convert_rgb=True)
    processor.save_pretrained(tmp_path)
    model = make_model(ReformerForImageClassification, dtype=torch.float32, num_labels=3, rotary_shape=(6, 5))
    model.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 6, "width": 5}
    classify = pipeline("image-classification", model=str(tmp_path))
    picture = image_module.new(mode, (31, 17), 1)
    picture.save(tmp_path / "picture.png")
    from_file, from_memory = classify(str(tmp_path / "picture.png")), classify(picture)
    assert len(from_file) == len(from_memory) == 3
    assert sum(x["score"] for x in from_file) == pytest.approx(1, abs=1e-5)
    (tmp_path / "cut.png").write_bytes((tmp_path / "picture.png").read_bytes()[:45])
    with pytest.raises((OSError, SyntaxError, ValueError)):
        classify(str(tmp_path / "cut.png"))


def test_an_exported_folder_serves_the_pipeline(speech, tmp_path):
    """Of a folder, the tokenizer and the feature extractor go along."""
    export(speech, tmp_path / "model")
    found = pipeline("automatic-speech-recognition", model=str(tmp_path / "model"), trust_remote_code=True)(TONE)
    assert found == pipeline("automatic-speech-recognition", model=str(speech))(TONE)
    processor = ViTImageProcessorPil(size={"height": 6, "width": 5})
    export(make_model(ReformerForImageClassification), tmp_path / "image", processor=processor)
    assert AutoImageProcessor.from_pretrained(tmp_path / "image").size == {"height": 6, "width": 5}
    (tmp_path / "image" / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preprocessor_config.json cannot be read"):
        export(tmp_path / "image", tmp_path / "again")


# --- reading sound


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float64])
def test_samples_of_every_dtype_are_the_same_sound(dtype):
    if np.dtype(dtype).kind == "f":
        samples = TONE.astype(dtype)
    else:
        info = np.iinfo(dtype)
        middle = 0 if info.min < 0 else (info.max + 1) // 2
        samples = (TONE * (info.max - middle) + middle).round().astype(dtype)
    found = waveform(samples, RATE)
    assert found.dtype == np.float32
    assert np.abs(found - TONE).max() < (0.01 if dtype is np.uint8 else 1e-4)


def test_a_list_of_whole_numbers_is_of_sixteen_bits():
    assert waveform([0, 16384, -32768], RATE).tolist() == [0.0, 0.5, -1.0]


@pytest.mark.parametrize("shape", [(2, 4000), (4000, 2)])
def test_channels_are_averaged_whichever_axis_they_are(shape):
    stereo = np.stack([TONE, 3 * TONE])
    stereo = stereo if shape[0] == 2 else stereo.T
    assert np.abs(waveform(stereo, RATE) - 2 * TONE).max() < 1e-6


@pytest.mark.parametrize(("old", "new"), [(8000, 16000), (44100, 8000), (8000, 11025)])
def test_resampling_keeps_duration_and_pitch(old, new):
    time = np.arange(old) / old
    found = resampled(np.sin(2 * np.pi * 440 * time).astype(np.float32), old, new)
    assert len(found) == new
    spectrum = np.abs(np.fft.rfft(found))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0), "is empty: it has no sample"),
        (b"", "is empty: it has no byte"),
        ([], "is empty"),
        (b"no sound at all", "no sound file that soundfile reads"),
        (written(TONE, subtype="PCM_16")[:30], "no sound file that soundfile reads|is empty"),
        (np.array([0, np.nan, 1]), "NaN or infinity, first at sample 1"),
        (np.array([0, np.inf]), "NaN or infinity, first at sample 1"),
        (np.zeros((4, 4)), r"shape \(4, 4\)"),
        (np.zeros((400, 400)), r"shape \(400, 400\)"),
        (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\)"),
        (np.array(["a"]), "samples are numbers"),
        ([[1, 2], [3]], "no array of samples"),
        ({"array": TONE}, "no `sampling_rate`"),
        ({"text": "a"}, "needs `array`"),
        ({"array": TONE, "sampling_rate": 0}, "Sampling rates of 0"),
    ],
    ids=str,
)
def test_sounds_that_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        waveform(source, RATE)


def test_one_sample_and_clipped_sounds_are_heard(speech):
    listen = pipeline("automatic-speech-recognition", model=str(speech))
    for samples in (TONE[:1], np.clip(TONE * 10, -1, 1), np.zeros(800, np.float32)):
        assert isinstance(listen(samples)["text"], str)


def test_a_missing_file_and_a_missing_library_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"There is no sound file `nowhere\.wav`"):
        waveform("nowhere.wav", RATE)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"\.\[signals\]"):
        waveform(b"RIFF", RATE)
