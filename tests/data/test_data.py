"""The corpus of installed packages, the readers for people's own files, and the trained tokenizer."""

import bz2
import gzip
import json
import lzma
import os
import random
import runpy
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_reformer import data
from hf_reformer.data import columns, tables
from hf_reformer.data.conversations import beginnings
from hf_reformer.data.demo_corpus import _NearDuplicates

pytest.importorskip("datasets")

packing = pytest.importorskip("hf_reformer.data.packing")

SMALL: dict = {"packages": ("torch", "transformers", "numpy", "datasets"), "num_packages": 3, "files_per_package": 12}


@pytest.fixture(scope="module")
def corpus():
    return data.installed_packages_corpus(**SMALL)


def rows(dataset):
    return [(row["path"], row["label"], row["text"]) for row in dataset]


def test_classes_are_balanced_and_named(corpus):
    label = corpus["train"].features["label"]
    assert len(label.names) == 3
    assert set(label.names) <= set(SMALL["packages"])
    for split in ("train", "validation"):
        counts = [corpus[split]["label"].count(number) for number in range(3)]
        assert min(counts) == max(counts) > 0
    for path, number, _ in rows(corpus["train"]):
        assert path.split("/")[0] == label.names[number]
        assert data.corpus_file(path).is_file()


def test_no_directory_is_in_both_splits(corpus):
    folders = {split: {path.rpartition("/")[0] for path, _, _ in rows(part)} for split, part in corpus.items()}
    assert folders["train"]
    assert folders["validation"]
    assert not folders["train"] & folders["validation"]


def test_no_line_names_a_package_or_imports_one(corpus):
    for part in corpus.values():
        for path, number, text in rows(part):
            assert part.features["label"].names[number].lower() not in text.lower(), path
            for line in text.splitlines():
                assert not data.names_a_package(line), (path, line)
                assert not line.lstrip().startswith(("import ", ">>> import ", ">>> from ")), (path, line)
                assert "copyright" not in line.lower(), (path, line)


def test_sizes_are_within_the_limits(corpus):
    for part in corpus.values():
        for path, _, text in rows(part):
            assert 2048 <= len(text.encode()) <= 16384, path


def test_two_calls_agree_and_the_seed_matters(corpus):
    again = data.installed_packages_corpus(**SMALL)
    other = data.installed_packages_corpus(**SMALL, seed=1)
    for split in ("train", "validation"):
        assert rows(corpus[split]) == rows(again[split])
        assert rows(corpus[split]) != rows(other[split])


def test_absent_packages_are_passed_over_and_too_few_are_an_error():
    with pytest.raises(ValueError, match="at least two"):
        data.installed_packages_corpus(packages=("numpy", "no_such_package_anywhere"), files_per_package=4)
    with pytest.raises(FileNotFoundError, match="not installed"):
        data.corpus_file("no_such_package_anywhere/x.py")


def test_cleaning_keeps_the_code_and_removes_what_names_the_package():
    source = '''#!/usr/bin/env python
# Copyright 2020 Somebody. Licensed under the Apache License.

"""Frobnicate things with NumPy."""
import os, sys
from .core import (
    a,
    b,
)
from x import \\
    y


def add(x):
    import torchvision
    """
    >>> import scipy
    >>> add(1)
    """
    z = np.asarray(x)  # by name
    # from here on, import duties are paid
    return x + 1  # keep (this


def other():
    return F.relu(nn.Linear), pd.NA, hf_hub_download
'''
    assert data.clean_source(source) == (
        'def add(x):\n    """\n    >>> add(1)\n    """\n    # from here on, import duties are paid\n'
        "    return x + 1  # keep (this\n\ndef other():\n"
    )


def test_cleaning_cuts_at_the_end_of_a_line():
    text = "".join(f"line_{i} = 'é'\n" for i in range(100))
    cut = data.clean_source(text, max_bytes=500)
    assert text.startswith(cut)
    assert 480 < len(cut.encode()) <= 500


def test_near_duplicates_are_recognised():
    seen = _NearDuplicates()
    lines = [f"this_is_statement(number={i})\n" for i in range(20)]
    assert seen.add("".join(lines))
    assert not seen.add("".join(reversed(lines)))
    assert not seen.add("".join(lines[:10]))
    assert not seen.add("".join(lines[:11]) + "".join(f"something_else(number={i})\n" for i in range(9)))
    assert seen.add("".join(lines[:5]) + "".join(f"something_new(number={i})\n" for i in range(9)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # modules are run a second time
def test_without_the_extra_the_module_imports_and_its_functions_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds when it is not installed
    monkeypatch.setitem(sys.modules, "sklearn", None)
    tables, corpus = (runpy.run_module(f"hf_reformer.data.{name}") for name in ("tables", "demo_corpus"))
    for call in (corpus["installed_packages_corpus"], lambda: tables["read_examples"]("table.csv")):
        with pytest.raises(ImportError, match=r"`datasets`.*pip install -e '\.\[train\]'"):
            call()


TABLE = {"text": ["good", "bad, really", "None", ""], "label": ["yes", "no", "no", "NA"]}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_tables_are_read_as_they_are(tmp_path, suffix):
    import pandas as pd

    file, table = tmp_path / f"table{suffix}", pd.DataFrame(TABLE)
    if suffix in (".csv", ".tsv"):
        table.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        table.to_parquet(file)
    else:
        table.to_json(file, orient="records", lines=suffix == ".jsonl")
    dataset = data.read_examples(file)
    assert [text or "" for text in dataset["text"]] == TABLE["text"]
    assert list(dataset["label"]) == TABLE["label"]


ODD = ["007", "7", "1.10", "NA", "null", "None", "True", "2020-01-01", "1e5", " a ", "", "x" * 200_000]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_cells_are_what_is_written_there(tmp_path, suffix):
    """Whatever they look like, also behind the first ten thousand, and every row once."""
    import csv

    import pandas as pd

    cells = ["1"] * 10_100 + ODD
    file, table = tmp_path / f"table{suffix}", pd.DataFrame({"text": cells, "label": cells[::-1]})
    if suffix in (".csv", ".tsv"):
        with open(file, "w", newline="") as out:
            csv.writer(out, delimiter="\t" if suffix == ".tsv" else ",").writerows([table.columns, *table.values])
    elif suffix == ".parquet":
        table.to_parquet(file)
    else:
        table.to_json(file, orient="records", lines=suffix == ".jsonl")
    dataset = data.read_examples(file)
    assert dataset["text"][:] == cells
    assert dataset["label"][:] == cells[::-1]


def test_json_cells_of_several_kinds_are_strings(tmp_path):
    rows = [1] * 10_001 + ["01", 2.5, True, None, 10**30]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in rows))
    assert data.read_examples(tmp_path / "t.jsonl")["text"][10_000:] == ["1", "01", "2.5", "True", None, str(10**30)]
    (tmp_path / "l.jsonl").write_text('{"label": "a"}\n{"label": ["a", "b"]}\n{"label": [1]}\n')
    assert data.read_examples(tmp_path / "l.jsonl")["label"][:] == [["a"], ["a", "b"], ["1"]]
    (tmp_path / "n.jsonl").write_text('{"x": 1}\n{"x": 2.5, "y": {"a": 1}}\n\n')
    assert data.read_examples(tmp_path / "n.jsonl").to_list() == [{"x": 1.0, "y": None}, {"x": 2.5, "y": {"a": 1}}]
    for whole in ('[{"a": "x"},\n {"a": "y"}]', '{\n"a": ["x", "y"]}', '{"a": {"0": "x", "1": "y"}}'):
        (tmp_path / "w.json").write_text(whole)
        assert data.read_examples(tmp_path / "w.json")["a"][:] == ["x", "y"]


def test_json_cells_become_strings_as_they_are_written(tmp_path, monkeypatch):
    """Also those of earlier batches, which alone would be numbers or lists."""
    monkeypatch.setattr(tables, "_BATCH", 2)
    for cells, wanted in (
        ([7, 0.5, "x"], ["7", "0.5", "x"]),
        ([1.5, True], ["1.5", "True"]),
        ([[1.5, True]], [["1.5", "True"]]),
        ([True, ["x"], {"a": 1}], ["True", '["x"]', '{"a": 1}']),
        ([0.5, 1, 2**63 - 1], ["0.5", "1", str(2**63 - 1)]),
        ([{"a": 0.5}, {"a": True}], ['{"a": 0.5}', '{"a": true}']),
    ):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"x": cell}) + "\n" for cell in cells))
        assert data.read_examples(tmp_path / "t.jsonl")["x"][:] == wanted
    (tmp_path / "t.jsonl").write_text('{"x": 1}\n{"x": 2}\n{}\n{}\n{"y": 3}\n')
    table = {"x": [1, 2, None, None, None], "y": [None, None, None, None, 3]}
    assert data.read_examples(tmp_path / "t.jsonl").to_dict() == table


def test_names_that_differ_from_row_to_row_are_data(tmp_path):
    """A column, or a field, for each would take hours."""
    file, rows = tmp_path / "t.jsonl", [{"text": "x", "meta": {f"k{i}": i}} for i in range(12_000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [json.loads(x) for x in data.read_examples(file)["meta"][:]] == [row["meta"] for row in rows]
    file.write_text("".join(json.dumps({"text": "x", **row["meta"]}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"t\.jsonl` have 10,001 names"):
        data.read_examples(file)


def test_a_line_of_jsonl_is_a_row_and_numbered_columns_of_json_are_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"], "label": ["x", "y"]}\n')
    assert data.read_examples(tmp_path / "a.jsonl").to_list() == [{"text": ["a", "b"], "label": ["x", "y"]}]
    (tmp_path / "a.json").write_text('{"text": {"3": "a", "7": "b"}, "label": {"3": "x", "7": "y"}}')  # filtered rows
    assert data.read_examples(tmp_path / "a.json")["label"][:] == ["x", "y"]
    (tmp_path / "a.json").write_text('{"answers": {"1": "x"}}')  # one record
    assert data.read_examples(tmp_path / "a.json").to_list() == [{"answers": {"1": "x"}}]


def test_duplicate_names_are_refused_in_the_time_of_their_number(tmp_path):
    pairs = ", ".join(f'"{i % 20_000}": 1' for i in range(40_000))
    (tmp_path / "a.jsonl").write_text("{" + pairs + "}\n")
    with pytest.raises(
        ValueError, match=r"a\.jsonl`, line 1, is not valid JSON: one object has several values called \['0', "
    ) as told:
        data.read_examples(tmp_path / "a.jsonl")
    assert len(str(told.value)) < 300


def test_a_parquet_file_that_was_replaced_is_read_anew(tmp_path):
    """Also one of the same time of modification, as a copy has."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for text in ("a", "b"):
        parquet.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
        os.utime(tmp_path / "a.parquet", (10**9, 10**9))
        assert data.read_examples(tmp_path / "a.parquet")["text"][:] == [text]
        time.sleep(0.02)
    parquet.write_table(pa.table({"text": pa.array([], "string")}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds no row"):
        data.read_examples(tmp_path / "a.parquet")
    cells = pa.array([b"\xff"]).view("string")
    parquet.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"cannot be read as parquet.*UTF8"):
        data.read_examples(tmp_path / "a.parquet")


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-be", "utf-32-be"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "a.csv").write_bytes((mark + 'text,label\r\n"é\n猫",x\r\n').encode(encoding))
    assert data.read_examples(tmp_path / "a.csv").to_list() == [{"text": "é\n猫", "label": "x"}]
    (tmp_path / "a.jsonl").write_bytes((mark + '{"text": "é猫"}\n{"text": "b"}\n').encode(encoding))
    assert data.read_examples(tmp_path / "a.jsonl")["text"][:] == ["é猫", "b"]
    (tmp_path / "labelled" / "x").mkdir(parents=True)
    (tmp_path / "labelled" / "x" / "a.txt").write_bytes((mark + "é猫\r\n").encode(encoding))
    assert data.read_examples(tmp_path / "labelled")["text"][:] == ["é猫\n"]
    (tmp_path / "a.txt").write_bytes((mark + "é猫\r\n").encode(encoding))
    assert ["".join(x) for x in packing.read_documents([str(tmp_path / "a.txt")])] == ["é猫\r\n"]


NO_TEXT = {
    "latin-1": (
        "é".encode() * 600_000 + "é\n".encode("latin-1"),
        "not valid UTF-8 text: byte 0xe9 at position 1200000",
    ),
    "cut": ("é".encode()[:1], "byte 0xc3 at position 0"),
    "utf-16 without a mark": ("ab".encode("utf-16-le"), "character 1 is NUL"),
    "half of utf-16": ("ab".encode("utf-16")[:-1], "not valid UTF-16 text"),
    "nul": (b"a\0b", "character 1 is NUL"),
    "gzip": (gzip.compress(b"text"), "compressed .gzip"),
    "bzip2": (bz2.compress(b"text"), "compressed .bzip2"),
    "xz": (lzma.compress(b"text"), "compressed .xz"),
    "zip": (b"PK\x03\x04abc", "compressed .zip"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_bytes_that_are_no_text_are_refused(tmp_path, kind):
    content, words = NO_TEXT[kind]
    (tmp_path / "labelled" / "x").mkdir(parents=True)
    for name in ("a.csv", "a.tsv", "a.json", "a.jsonl", "labelled/x/a.txt", "a.txt"):
        (tmp_path / name).write_bytes(content)
    for read in (
        *(lambda name=name: data.read_examples(tmp_path / name) for name in ("a.csv", "a.tsv", "a.json", "a.jsonl")),
        lambda: data.read_examples(tmp_path / "labelled"),
        lambda: [list(x) for x in packing.read_documents([str(tmp_path / "a.txt")])],
    ):
        with pytest.raises(ValueError, match=rf"a\.\w+`.*{words}"):
            read()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\nx,y\nx,y,z\n", r"line 3: there are 3 cells.*2 columns"),
        ("a.csv", "text,label\nx\n", r"line 2: there are 1 cells"),
        ("a.csv", 'text,label\n"x,y\nz,w\n', r"line 3.*quotes"),
        ("a.csv", "text,text\nx,y\n", r"several columns called \['text'\]"),
        ("a.csv", "text,label\n", "holds no row"),
        ("a.jsonl", '{"a": 1}\n{"a": 1\n', "line 2, is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: a list"),
        ("a.jsonl", '{"a": "\\ud800"}\n', "half a character"),
        ("a.jsonl", '{"a": [{"\\udc00": 1}]}\n{"a": 1}\n', "line 1.*half a character"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"line 2.*several values called \['a'\]"),
        ("a.json", '[{"a": 1},\n{"a": 1, "a": 2}]', r"several values called \['a'\]"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1.*recursion"),
        ("a.jsonl", '{"a": ' + "[" * 100 + "]" * 100 + "}\n", "Recursion level"),
        ("a.json", "[1, 2]", "where a row is an object"),
        ("a.json", "[]", "holds no row"),
        ("a.parquet", "text", "cannot be read as parquet"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}`.*{words}"):
        data.read_examples(tmp_path / name)


def test_a_folder_of_texts_is_read(tmp_path):
    for name, text in {"pos/1.txt": "good", "pos/deep/2.txt": "fine", "neg/a": "bad", "neg/.hidden": "x"}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    dataset = data.read_examples(tmp_path)
    assert set(zip(dataset["text"], dataset["label"], strict=True)) == {
        ("good", "pos"),
        ("fine", "pos"),
        ("bad", "neg"),
    }
    with pytest.raises(ValueError, match="one sub-folder per label"):
        data.read_examples(tmp_path / "neg")


def test_unreadable_files_are_explained(tmp_path):
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(ValueError, match=r"unknown extension.*\.csv"):
        data.read_examples(tmp_path / "data.xlsx")
    with pytest.raises(FileNotFoundError, match=r"missing\.csv"):
        data.read_examples(tmp_path / "missing.csv")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl` is empty"):
        data.read_examples(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("names", "options", "columns"),
    [
        (["id", "text", "label"], {}, ("text", None, "label")),
        (["sentence1", "sentence2", "label", "idx"], {}, ("sentence1", "sentence2", "label")),
        (["premise", "hypothesis", "label"], {}, ("premise", "hypothesis", "label")),
        (["question", "sentence", "label"], {}, ("question", "sentence", "label")),
        (["question", "text", "label"], {}, ("text", None, "label")),
        (["words", "class"], {}, ("words", None, "class")),
        (["a", "b", "c"], {"text": "b", "label": "c"}, ("b", None, "c")),
        (["a", "b", "c"], {"text": "b", "pair": "a"}, ("b", "a", None)),
        (["text"], {}, ("text", None, None)),
        (["id", "words", "label", "labels"], {}, ("words", None, "label")),
    ],
)
def test_columns_are_found_by_their_names(names, options, columns):
    from datasets import Dataset

    dataset = Dataset.from_dict({name: ["1"] if name == "id" else ["x"] if name != "idx" else [1] for name in names})
    assert data.find_columns(dataset, **options) == columns


def test_columns_that_are_unclear_are_asked_for():
    from datasets import Dataset

    dataset = Dataset.from_dict({"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match=r"`a`, `b`.*--text_column"):
        data.find_columns(dataset)
    with pytest.raises(ValueError, match=r"no column `c`.*`a`, `b`"):
        data.find_columns(dataset, text="c")
    with pytest.raises(ValueError, match="--text_column and --label_column both name the column `a`"):
        data.find_columns(dataset, text="a", label="a")


def test_the_column_text_is_the_text_whatever_it_holds():
    from datasets import Dataset

    for cells in ([1, 2], [0.5, 1.5], ["1", "2"], [None, None]):
        assert data.find_columns(Dataset.from_dict({"words": ["x", "y"], "text": cells})).text == "text"
    assert [tables.cell_text(cell) for cell in (0, 1.5, "007", True, None, float("nan"))] == [
        "0", "1.5", "007", "True", None, None
    ]  # fmt: skip
    with pytest.raises(ValueError, match="holds no text"):
        tables.cell_text([1])


def test_held_out_part_has_every_label_in_proportion():
    from datasets import Dataset

    dataset = Dataset.from_dict({"labels": [0] * 80 + [1] * 20, "row": list(range(100))})
    split = data.hold_out(dataset, "labels", 0.2, seed=0)
    assert split["validation"]["labels"].count(1) == 4
    assert split["validation"]["labels"].count(0) == 16
    assert sorted([*split["train"]["row"], *split["validation"]["row"]]) == list(range(100))
    assert split["validation"]["row"] == data.hold_out(dataset, "labels", 0.2, seed=0)["validation"]["row"]
    assert split["validation"]["row"] != data.hold_out(dataset, "labels", 0.2, seed=1)["validation"]["row"]


@pytest.mark.parametrize(("fraction", "rows"), [(0.1, 10), (0.5, 50), (0.75, 75), (0.9, 90)])
@pytest.mark.parametrize("label", ["labels", None])
def test_the_held_out_part_is_as_large_as_asked_for(fraction, rows, label):
    from datasets import Dataset

    dataset = Dataset.from_dict({"labels": [i % 3 for i in range(100)]})
    split = data.hold_out(dataset, label, fraction, seed=0)
    assert (len(split["train"]), len(split["validation"])) == (100 - rows, rows)
    with pytest.raises(ValueError, match=r"--validation_fraction 0.1 of 4 rows"):
        data.hold_out(dataset.select(range(4)), label, 0.1, seed=0)


@given(st.lists(st.integers(0, 20), min_size=30, max_size=80), st.sampled_from([0.1, 0.3, 0.5]), st.integers(0, 9))
def test_rows_of_one_group_are_held_out_together(groups, fraction, seed):
    from datasets import Dataset

    dataset = Dataset.from_dict({"row": range(len(groups))})
    split = data.hold_out(dataset, None, fraction, seed, groups)
    train, held_out = ({groups[row] for row in split[name]["row"]} for name in ("train", "validation"))
    if len(set(groups)) > 1:
        assert not train & held_out
    assert sorted([*split["train"]["row"], *split["validation"]["row"]]) == list(range(len(groups)))
    assert abs(len(split["validation"]) - fraction * len(groups)) <= max(map(groups.count, groups))


def test_parts_of_one_dialogue_are_one_group():
    talk = [{"role": "user" if i % 2 == 0 else "assistant", "content": str(i)} for i in range(6)]
    other = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "no"}]
    found = beginnings([talk[:4], talk[:2], other, talk])
    assert found[0] == found[1] == found[3] != found[2]


def test_which_splits_are_a_part():
    names = ["train", "train_gen", "test_a", "test_b", "validation"]
    assert columns.splits_of("train", names) == ["train"]
    assert columns.splits_of("train", names[1:]) == []
    assert columns.splits_of("test", names) == ["test_a", "test_b"]


def test_only_a_test_split_without_a_single_label_is_to_be_predicted():
    for label in (None, "", -1, "-1", -1.0, float("nan"), [], [None, -1]):
        assert columns.labels_unknown("test_a", [label, label])
        assert not columns.labels_unknown("validation", [label])
        assert not columns.labels_unknown("test", [label, "x"])


def test_a_data_set_that_is_a_script_is_refused_with_advice(monkeypatch):
    import datasets

    def load(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"`me/x` is a script.*parquet.*--train_file"):
        tables.read_named_dataset("me/x")


def test_holding_out_reads_its_column_at_once(monkeypatch):
    """Row by row, a million rows take minutes."""
    from datasets import Dataset
    from datasets.arrow_dataset import Column

    asked, get = [], Column.__getitem__
    monkeypatch.setattr(Column, "__getitem__", lambda self, key: asked.append(key) or get(self, key))
    data.hold_out(Dataset.from_dict({"labels": [0, 1] * 500}), "labels", 0.1, seed=0)
    assert asked == [slice(None)]


def test_a_million_documents_are_held_out_in_their_order():
    train, held_out = packing.hold_out_end(["ab"] * 10**6, 0.5)
    assert (len(train), len(held_out)) == (500_000, 500_000)


def test_a_tokenizer_learns_from_a_long_line_without_spaces_in_a_moment():
    """Seconds; as one word it would take hours."""
    draw = random.Random(0)
    line = "".join(draw.choice("abcdefgh") for _ in range(100_000))
    tokenizer = data.train_bpe_tokenizer([line], vocab_size=400)
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer(line[:1000])["input_ids"], skip_special_tokens=True) == line[:1000]


@pytest.mark.parametrize("causal", [True, False])
def test_what_a_causal_model_continues_has_no_end(causal):
    tokenizer = data.train_bpe_tokenizer(["the cat sat"] * 3, vocab_size=270, causal=causal)
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the cat", " sat"))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    assert tokenizer("the cat")["input_ids"] == begin + a + end * (not causal)
    assert tokenizer("the cat", " sat")["input_ids"] == begin + a + end + b + end * (not causal)


def test_trained_tokenizer_round_trips_any_text_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    texts = ["the cat sat on the mat", "the dog sat on the log"] * 20
    tokenizer = data.train_bpe_tokenizer(texts, vocab_size=280, max_length=64)
    again = data.train_bpe_tokenizer(texts, vocab_size=280, max_length=64)
    assert tokenizer.get_vocab() == again.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the naïve 猫\n\n  sat\t"
    ids = tokenizer(text)["input_ids"]
    assert ids == reloaded(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")
    assert reloaded.model_max_length == 64
    pair = tokenizer("a", "b")
    assert set(pair) == {"input_ids", "attention_mask"}
    assert pair["input_ids"].count(tokenizer.eos_token_id) == 2
