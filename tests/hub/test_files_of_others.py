"""Files that somebody else wrote: whatever stands in them, they are read or refused in words, and do nothing else."""

import gzip
import io
import json
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from builtin_cases import make_builtin
from conftest import make_model
from huggingface_hub.errors import StrictDataclassError
from test_convert import SIZES, TRAX_FIELDS, make_original

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from hf_reformer.hub import export
from hf_reformer.hub.convert import convert
from hf_reformer.hub.convert.reformer_pytorch import from_reformer_pytorch
from hf_reformer.hub.convert.trax import MOST_INSTRUCTIONS, from_trax, read_pickle
from hf_reformer.training.model_setup import ModelArguments, make_tokenizer
from reformer_cli.text_generation import load as load_to_generate

# ---- pickles, written instruction by instruction


def name(module, own):
    return b"c" + module.encode() + b"\n" + own.encode() + b"\n"


def value(x):
    """The instructions of a plain value."""
    return pickle.dumps(x, 2)[2:-1]


def call(function, *arguments):
    """Arguments are instructions already."""
    return function + b"(" + b"".join(arguments) + b"tR"


def state(*parts):
    return b"(" + b"".join(parts) + b"tb"


RECONSTRUCT, NDARRAY = name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray")
FROM_BUFFER = name("numpy._core.numeric", "_frombuffer")
NONE, FALSE = b"N", b"\x89"


def dtype(code="f4", *, order="<", subdtype=NONE, names=NONE, fields=NONE, size=-1, alignment=-1, flags=0, version=3):
    made = call(name("numpy", "dtype"), value(code) if isinstance(code, str) else code, value(False), value(True))
    described = (value(version), value(order), subdtype, names, fields, value(size), value(alignment), value(flags))
    return made + state(*described)


def array(shape=(2,), kind=None, values=b"\0" * 8, fortran=FALSE):
    """The instructions of an array; `values` are bytes or instructions within a list."""
    values = values[0] if isinstance(values, list) else value(values)
    kind = dtype() if kind is None else kind
    shape = shape[0] if isinstance(shape, list) else value(shape)
    return call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b")) + state(value(1), shape, kind, fortran, values)


POINTER = struct.pack("<Q", 0x4141414141414141)
OBJECT_FIELD = b"}" + value("a") + b"(" + dtype("O8", order="|", flags=63) + value(0) + b"ts"
HIDDEN = {"names": value(("a",)), "fields": OBJECT_FIELD, "size": 8, "alignment": 1}
SUBARRAY = b"(" + dtype("O8", order="|") + value((1,)) + b"t"

BAD_ARRAYS = {
    "objects": array((1,), dtype("O8", order="|", flags=63), POINTER),
    "objects in a list": array((1,), dtype("O8", order="|", flags=63), [b"]" + b"K\x01a"]),
    "objects in a hidden field": array((1,), dtype("V8", order="|", **HIDDEN), POINTER),
    "objects in a field": array((1,), dtype("V8", order="|", flags=63, **HIDDEN), POINTER),
    "objects in a subarray": array((1,), dtype("V8", order="|", subdtype=SUBARRAY, size=8), POINTER),
    "objects by another size": array((1,), dtype("f8", size=8), POINTER),
    "objects by flags": array((1,), dtype("f8", flags=63), POINTER),
    "an order that is none": array((2,), dtype(order="O")),
    "a version more": array((2,), dtype(version=4) + state(*[value(x) for x in (4, "<", None, None)])),
    "void": array((1,), dtype("V8", order="|"), POINTER),
    "text": array((1,), dtype("U2"), POINTER),
    "dates": array((1,), dtype("M8"), POINTER),
    "fields by a list": array((1,), dtype(b"]" + value(("a", "O8")) + b"a"), POINTER),
    "fields by commas": array((1,), dtype("O8,f4"), POINTER + b"\0" * 4),
    "a type that is a class": array((1,), call(name("numpy", "dtype"), name("builtins", "object"))),
    "a type that is text": array((2,), value("f4")),
    "a negative size": array((-2,), values=b"\0" * 8),
    "two negative sizes": array((-1, -2), values=b"\0" * 8),
    "a huge size": array((2**62,), values=b"\0" * 8),
    "a size that overflows": array((2**61, 2**61, 4), values=b""),
    "a size beyond all numbers": array((10**4000,), values=b""),
    "a size of nothing": array((0, 2**62), values=b""),
    "a size that is true": array((True, 2)),
    "a size that is a float": array((2.0,)),
    "a shape that is a list": array([b"]K\x02a"]),
    "many axes": array((1,) * 65 + (2,)),
    "too few values": array((3,)),
    "too many values": array((1,)),
    "no values": array(values=[NONE]),
    "values of another array": array(values=[array()]),
    "no state": call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b")) + state(value(1)),
    "a scalar of objects": call(name("numpy._core.multiarray", "scalar"), dtype("O8", order="|"), value(POINTER)),
    "a long scalar": call(name("numpy._core.multiarray", "scalar"), dtype(), value(POINTER)),
    "a buffer of objects": call(FROM_BUFFER, value(POINTER), dtype("O8"), value((1,)), value("C")),
    "a buffer that is short": call(FROM_BUFFER, value(POINTER), dtype(), value((3,)), value("C")),
    "a buffer of no order": call(FROM_BUFFER, value(POINTER), dtype(), value((2,)), value("A")),
    "axes that are none": call(FROM_BUFFER, value(POINTER), dtype(), value((2, 1)), value("K"), value((0, 7))),
    "a persistent id": b"Pobject\n",
    "a persistent object": value(("storage",)) + b"Q",
    "an extension": b"\x82\x01",
    "a buffer from elsewhere": b"\x97",
    "text called": call(value("numpy.dtype"), value("f4")),
    "no names": value(1) + value(2) + b"\x93",
    "an empty stack": b"0",
    "a mark alone": b"t",
    "a memo that is not there": b"h\x05",
    "an append to a number": value(1) + value(2) + b"a",
    "an item of a number": value(1) + value(2) + value(3) + b"s",
    "a key without value": b"}" + b"(" + value("a") + b"u",
    "a number without end": b"I" + b"9" * 100_000 + b"\n",
    "too many instructions": b"N" * (MOST_INSTRUCTIONS + 2),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_crafted_pickle_is_refused_in_words(case, tmp_path):
    file = tmp_path / "weights.pkl"
    file.write_bytes(b"\x80\x02" + BAD_ARRAYS[case] + b".")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"no pickle of Trax weights that can be read: .*\.$"):
        read_pickle(file)
    assert time.monotonic() - begin < 20


BAD_TREES = {
    "a function": (name("os", "system"), "found a `os.system`"),
    "what a function makes": (call(name("os", "system"), value("exit 1")), "found a `os.system`"),
    "an instance": (b"(" + value("exit 1") + b"ios\nsystem\n", "found a `os.system`"),
    "an old instance": (b"(" + name("os", "system") + value("exit 1") + b"o", "found a `os.system`"),
    "a new instance": (name("os", "system") + value(("exit 1",)) + b"\x81", "found a `os.system`"),
    "a name on the stack": (value("os") + value("system") + b"\x93" + value(("exit 1",)) + b"R", "`os.system`"),
    "a name of two lines": (value("os\n# ") + value("x" * 1000) + b"\x93", r"found a `os\\n# \.x{1,80}`"),
    "an array of another class": (call(RECONSTRUCT, name("a", "b"), value((0,)), value(b"b")), "_reconstruct`"),
    "an array without values": (call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b")), "found NoneType"),
    "whole numbers": (array(kind=dtype("i4")), "found int32 array"),
    "a list that holds itself": (b"]q\x00h\x00a", "more than 100,000 parts"),
    "lists of lists of lists": (b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60)), "100,000 parts"),
    "an array many times": (array((2**20,), values=bytes(2**22)) + b"q\x00](" + b"h\x00" * 2000 + b"e", "repeats"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_a_pickle_that_holds_no_weights_is_refused_in_words(case, tmp_path):
    instructions, message = BAD_TREES[case]
    (tmp_path / "weights.pkl").write_bytes(b"\x80\x02" + instructions + b".")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "weights.pkl", tmp_path / "out", kind="trax", fields=TRAX_FIELDS)
    assert not (tmp_path / "out").exists()


def test_keys_of_a_pickle_are_not_hashed(tmp_path):
    """Nested tuples take exponential time, and deep ones more stack than there is."""
    doubled = b")" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(100))
    deep = b")" + b"\x85" * 300_000
    for key in (doubled, deep, value((1, 2))):
        (tmp_path / "weights.pkl").write_bytes(b"\x80\x02}" + key + b"Ns" + value("a") + b"K\x05s.")
        assert read_pickle(tmp_path / "weights.pkl") == {"a": 5}


def test_a_pickle_changes_nothing_in_the_process(tmp_path):
    before = np._core.numeric._frombuffer.__defaults__
    changes = FROM_BUFFER + b"N}" + value("__defaults__") + value((1, 2, 3)) + b"s\x86b"
    for instructions in (changes, NDARRAY + b"N}" + value("x") + value(1) + b"s\x86b"):
        (tmp_path / "weights.pkl").write_bytes(b"\x80\x02" + instructions + b".")
        read_pickle(tmp_path / "weights.pkl")
    assert np._core.numeric._frombuffer.__defaults__ == before
    assert not hasattr(np.ndarray, "x")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numbers_are_read_as_they_are(protocol, tmp_path):
    shuffled = np.arange(24, dtype=">f4").reshape(2, 3, 4)
    arrays = [np.zeros((0, 3)), np.float16(1.5), shuffled, shuffled.T, shuffled.transpose(1, 0, 2), shuffled[::2, 1:]]
    arrays += [np.arange(5).astype(kind) for kind in ("<i2", ">u8", "b", "?", "<f8")]
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    for found, expected in zip(read_pickle(tmp_path / "arrays.pkl"), arrays, strict=True):
        assert found.array.dtype == expected.dtype
        assert np.array_equal(found.array, expected)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    zeros = gzip.compress(bytes(2**22), 9)
    weights = gzip.compress(b"\x80\x04\x8e" + struct.pack("<Q", 2**36))  # bytes, so many
    for case, data in {
        "noise": zeros * 1000,
        "bytes": weights + zeros * 1000,
        "text": gzip.compress(b"I") + zeros * 1000,
    }.items():
        (tmp_path / case).write_bytes(data)
        begin = time.monotonic()
        with pytest.raises(ValueError, match="no pickle of Trax weights"):
            read_pickle(tmp_path / case)
        assert time.monotonic() - begin < 20


def test_trax_weights_of_sizes_that_contradict_each_other_take_no_memory():
    wide, narrow = np.zeros((1, 10**5), np.float32), np.zeros(1, np.float32)
    attention = [np.zeros((1, 10**5, 1), np.float32)] * 2 + [np.zeros((1, 1, 10**5), np.float32)]
    norm, dense = [np.zeros(10**5, np.float32)] * 2, [wide.T, np.zeros(10**5, np.float32)]
    tables = [np.zeros((1, 2, 1, 1), np.float32), np.zeros((1, 1, 2, 10**5 - 1), np.float32)]
    tree = [wide, tables, norm, attention, norm, [wide, *dense[1:]], dense, [narrow] * 2, [wide.T, narrow]]
    with pytest.raises(ValueError, match="contradict each other"):
        from_trax(tree, TRAX_FIELDS)


# ---- files of torch


def test_a_file_of_torch_is_not_larger_than_it_looks(tmp_path):
    plain = io.BytesIO()
    torch.save({"token_emb.weight": torch.zeros(2**20)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in source.namelist():
            packed.writestr(entry, source.read(entry))
    torch.save({"token_emb.weight": torch.zeros(1).expand(10**12)}, tmp_path / "repeated.pt")
    torch.save({"token_emb.weight": torch.zeros(3, device="meta")}, tmp_path / "empty.pt")
    torch.save({"token_emb.weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    for name, message in (
        ("packed", "unpacks to"),
        ("repeated", "repeats"),
        ("empty", "values"),
        ("sparse", "sparse"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"{name}.pt", tmp_path / "out", fields=SIZES)


def endless_key(legacy: bool) -> bytes:
    """A file of torch of a few bytes: a dict, one of whose keys is a tuple of 2^60 parts."""
    doubled = b"".join(b"h\x01h\x01\x86q\x01" for _ in range(60))
    pickled = b"\x80\x02](K\x00\x85q\x01" + doubled + b"e}h\x01K\x01s."
    good = io.BytesIO()
    torch.save({}, good, _use_new_zipfile_serialization=not legacy)
    if legacy:
        return good.getvalue().replace(pickle.dumps({}, 2), pickled)
    made = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(made, "w") as archive:
        for entry in source.namelist():
            archive.writestr(entry, pickled if entry.endswith("data.pkl") else source.read(entry))
    return made.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_key_without_end_is_refused(legacy, tmp_path):
    """By whatever reads a file of torch; hashing it would never end."""
    (tmp_path / "weights.pt").write_bytes(endless_key(legacy))
    with pytest.raises(ValueError, match="more parts than weights need"):
        convert(tmp_path / "weights.pt", tmp_path / "out", kind="reformer-pytorch", fields=SIZES)
    folder = saved(tmp_path / "model")
    model = ReformerForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    ReformerForCausalLM.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(endless_key(legacy))
    for load in (READERS["export"], READERS["generate"], ReformerForCausalLM.from_pretrained):
        with pytest.raises((ValueError, pickle.UnpicklingError), match="more parts than weights need"):
            load(folder)


def test_a_checkpoint_that_names_a_block_far_away_takes_the_time_of_its_size():
    state = make_original().state_dict()
    for number in (10**9, 10**30, 3):
        moved = {key.replace(".blocks.1.", f".blocks.{number}."): x for key, x in state.items()}
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"Layer 1 is missing|contradict"):
            from_reformer_pytorch(moved, {**SIZES, "depth": 2})
        assert time.monotonic() - begin < 5


def test_matrices_whose_product_would_fill_the_memory_are_refused():
    state = make_original(emb_dim=8).state_dict()
    state["token_emb.weight"] = torch.zeros(10**5, 8)
    for layer in range(2):
        state[f"reformer.layers.blocks.{layer}.f.net.fn.toqk.weight"] = torch.zeros(16, 10**5)
    with pytest.raises(ValueError, match="far more than they hold"):
        from_reformer_pytorch(state, SIZES)


# ---- folders

READERS = {
    "convert": lambda folder: convert(folder, folder.parent / "out"),
    "export": lambda folder: export(folder, folder.parent / "out"),
    "generate": lambda folder: load_to_generate(str(folder), device="cpu"),
    "train": lambda folder: make_tokenizer(ModelArguments(model_name_or_path=str(folder)), [], 64),
}
readers = pytest.mark.parametrize("reader", READERS)
readers_of_models = pytest.mark.parametrize("reader", sorted(READERS.keys() - {"train"}))


def saved(folder, builtin=False, **options):
    model = make_model(ReformerForCausalLM, vocab_size=260, dtype=torch.float32)
    if builtin:
        model = make_builtin("ReformerModelWithLMHead", num_buckets=8, vocab_size=260)
    model.save_pretrained(folder, **options)
    ReformerByteTokenizer().save_pretrained(folder)
    return folder


def of_the_reader(reader, folder, **options):
    """A folder that the reader serves."""
    return saved(folder, builtin=reader == "convert", **options)


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret").write_text("{}")
    (tmp_path / "elsewhere" / "more" / "key.jinja").write_text("a private key")
    return tmp_path / "elsewhere"


LINKS = ["vocab.txt", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "merges.txt"]


@readers
@pytest.mark.parametrize("name", [*LINKS, "chat_template.jinja", "additional_chat_templates"])
def test_a_link_to_a_file_elsewhere_is_refused(name, reader, tmp_path, elsewhere):
    folder = of_the_reader(reader, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere / ("more" if name.endswith("templates") else "secret"))
    with pytest.raises(ValueError, match=f"{name} .*outside the directory"):
        READERS[reader](folder)
    assert not (tmp_path / "out").exists()


@readers
def test_links_within_templates_loops_and_pipes_are_refused(reader, tmp_path, elsewhere):
    folder = of_the_reader(reader, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(elsewhere / "more" / "key.jinja")
    with pytest.raises(ValueError, match=r"a\.jinja .*outside the directory"):
        READERS[reader](folder)
    (folder / "additional_chat_templates" / "a.jinja").unlink()
    (folder / "vocab.txt").symlink_to("vocab.txt")
    with pytest.raises(ValueError, match=r"vocab\.txt is a link to itself"):
        READERS[reader](folder)
    (folder / "vocab.txt").unlink()
    os.mkfifo(folder / "merges.txt")
    with pytest.raises(ValueError, match=r"merges\.txt is no file, but a pipe"):
        READERS[reader](folder)


@readers
@pytest.mark.parametrize("way", ["up", "absolute", "link"])
def test_an_index_of_weights_names_files_of_its_folder_only(way, reader, tmp_path):
    folder = of_the_reader(reader, tmp_path / "model", max_shard_size="20KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    (tmp_path / "other").mkdir()
    moved = next(iter(index["weight_map"].values()))
    (folder / moved).rename(tmp_path / "other" / moved)
    named = {"up": f"../other/{moved}", "absolute": str(tmp_path / "other" / moved), "link": moved}[way]
    if way == "link":
        (folder / moved).symlink_to(tmp_path / "other" / moved)
    index["weight_map"] = {key: named if name == moved else name for key, name in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the directory"):
        READERS[reader](folder)
    if way != "link":
        with pytest.raises(ValueError, match="lies elsewhere"):
            ReformerForCausalLM.from_pretrained(folder)


@readers
@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"transformers_weights": "../elsewhere/weights.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../elsewhere/tokenizer.1.0.json"]}),
    ],
)
def test_configs_name_files_of_their_folder_only(file, fields, reader, tmp_path, elsewhere):
    folder = of_the_reader(reader, tmp_path / "model")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
    with pytest.raises(ValueError, match="outside the directory"):
        READERS[reader](folder)


@readers
def test_a_folder_of_the_hubs_cache_is_read(reader, tmp_path):
    snapshot = tmp_path / "models--ada--one" / "snapshots" / ("0" * 40)
    of_the_reader(reader, snapshot)
    (tmp_path / "models--ada--one" / "blobs").mkdir()
    for number, file in enumerate(list(snapshot.iterdir())):
        file.rename(tmp_path / "models--ada--one" / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    READERS[reader](snapshot)
    (tmp_path / "latest").symlink_to(snapshot)
    assert load_to_generate(str(tmp_path / "latest"), device="cpu")


@readers_of_models
def test_an_adapter_beside_a_model_is_not_taken_for_it(reader, tmp_path):
    folder = of_the_reader(reader, tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')
    with pytest.raises(ValueError, match="an adapter beside a model"):
        READERS[reader](folder)


@readers_of_models
@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"model_type": ["reformer"]}', '{"a": 1' + "0" * 5000 + "}", "\0", "1"]
)
def test_a_config_that_is_no_config_is_refused_in_words(text, reader, tmp_path):
    folder = of_the_reader(reader, tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|model of type|Unrecognized model"):
        READERS[reader](folder)


def test_a_config_far_larger_than_its_weights_takes_no_memory(tmp_path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for sizes in (
        {"hidden_size": 10**5, "feed_forward_size": 10**5},
        {"vocab_size": 2**31 - 1},
        {"num_labels": 10**6},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **sizes}))
        for load in (READERS["export"], READERS["generate"], ReformerForCausalLM.from_pretrained):
            with pytest.raises((ValueError, StrictDataclassError), match=r"cannot belong together|more than"):
                load(folder)
