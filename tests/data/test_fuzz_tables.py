"""Tables of odd cells in odd encodings: what is read is what was written, or an error names the file."""

import csv
import datetime
import decimal
import gzip
import json
import random
import re

import pytest
from fuzzing import seeds

from hf_reformer.data import tables

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
pa_csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")

STRINGS = [
    "", " ", "007", "7", "1.10", "-0", "1e5", "NA", "nan", "null", "None", "True", "false", "2020-01-01", "12:30",
    "a,b",
    'say "no"', '"', "'", "a\tb", ";", "a\nb", "\n", "a\r\nb", "a\rb", "é", "e\u0301", "猫", "🦎", "\u2028", "\x85",
    "\x0b\x1c", "\ufeff", "\\", "\\n", "{}", "[1]", "=1+1", "#", "%s", "../x", "x" * 3000,
]  # fmt: skip
NUMBERS = [0, 1, -1, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 0.5, 1.0, -0.0, 1e300, 5e-324]
ENCODINGS = ["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-32"]


def word(draw):
    return "".join(draw.choices(STRINGS, k=draw.choice([1, 1, 1, 2, 3])))


def cell(draw, depth=0):
    """Any value of JSON."""
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind < 3:
        return word(draw)
    if kind == 3:
        return draw.choice(NUMBERS)
    if kind < 6:
        return draw.choice([None, None, True, False, float("nan")])
    children = [cell(draw, depth + 1) for _ in range(draw.randrange(4))]
    return children if kind == 6 else {draw.choice(["a", "b", "", "é"]): child for child in children}


def column(draw, rows):
    """Cells of one kind, of one kind with holes, or of any."""
    kinds = [
        lambda: word(draw),
        lambda: draw.choice(NUMBERS),
        lambda: draw.randrange(-9, 10),
        lambda: draw.choice([True, False]),
        lambda: [word(draw) for _ in range(draw.randrange(3))],
        lambda: {"a": draw.randrange(3), "b": word(draw)},
    ]
    kind = draw.choice([*kinds, lambda: cell(draw), lambda: draw.choice(kinds)()])
    holes = draw.choice([0, 0, 0.3])
    return [None if draw.random() < holes else kind() for _ in range(rows)]


def header(draw):
    names = [
        *draw.sample(["text", "label", "x y", "a,b", 'q"q', "é", "1", "columns"], draw.randrange(1, 5)),
        word(draw),
    ]
    return list(dict.fromkeys(name for name in names if name))


def same(read, written):
    """Whether a cell that was read is the one that was written, maybe as its text, or in a list of one."""
    if isinstance(read, list) and not isinstance(written, (list, type(None))):
        return len(read) == 1 and same(read[0], written)
    if written is None or isinstance(written, str):
        return read == written
    if written != written:
        return read is None or read != read
    if isinstance(read, str):
        return same(json.loads(read), written) if isinstance(written, (list, dict)) else read == str(written)
    if isinstance(written, dict):  # objects of one column have the same keys
        keys = read.keys() if isinstance(read, dict) else set()
        return written.keys() <= keys and all(same(read[key], written.get(key)) for key in keys)
    if isinstance(written, list):
        return isinstance(read, list) and len(read) == len(written) and all(map(same, read, written))
    return isinstance(read, bool) == isinstance(written, bool) and read == written


def write_csv(draw, path, names, columns):
    """Cells are strings. Of the writers, pandas alone leaves a lone carriage return without quotes."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    writer = draw.choice(["csv", "pandas", "pyarrow"])
    if writer == "csv":
        options = {"quoting": draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])}
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter, **options).writerows([names, *zip(*columns, strict=True)])
    elif writer == "pandas":
        frame = pd.DataFrame(dict(zip(names, columns, strict=True)), dtype=object)
        frame.to_csv(path, index=False, sep=delimiter, quoting=csv.QUOTE_ALL)
    else:
        options = pa_csv.WriteOptions(delimiter=delimiter)
        pa_csv.write_csv(pa.table(dict(zip(names, columns, strict=True))), path, write_options=options)


def write_json(draw, path, names, columns):
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]
    ascii_only = draw.random() < 0.5
    if all(isinstance(x, str) for cells in columns for x in cells) and draw.random() < 0.3:
        frame = pd.DataFrame(dict(zip(names, columns, strict=True)), dtype=object)
        if path.suffix == ".jsonl":
            frame.to_json(path, orient="records", lines=True, force_ascii=ascii_only)
        else:
            frame.index += draw.choice([0, 3])  # as of a frame that was filtered
            orient = draw.choice(["records", "columns"])
            frame.to_json(path, orient=orient, force_ascii=ascii_only)
    elif path.suffix == ".jsonl":
        end = draw.choice(["\n", "\r\n", "\n\n"])
        path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows), newline="")
    else:
        whole = draw.choice([rows, dict(zip(names, columns, strict=True))])
        path.write_text(json.dumps(whole, ensure_ascii=ascii_only, indent=draw.choice([None, 1])))


def write_parquet(draw, path, names, columns):
    """Returns the columns, of types that JSON lacks, too."""
    rows = len(columns[0])
    odd = [
        pa.array([datetime.date(2020, 1, draw.randrange(1, 28)) for _ in range(rows)]),
        pa.array([datetime.datetime(2020, 1, 1, draw.randrange(24)) for _ in range(rows)]),
        pa.array([decimal.Decimal(f"{draw.randrange(100)}.10") for _ in range(rows)]),
        pa.array([word(draw) for _ in range(rows)]).dictionary_encode(),
        pa.array([word(draw) for _ in range(rows)], pa.large_string()),
        pa.array([word(draw).encode() for _ in range(rows)]),
        pa.array([[1.5, None]] * rows),
    ]
    arrays = []
    for cells in columns:
        try:
            array = pa.array(cells)
            arrays.append(draw.choice([array, draw.choice(odd)] if "struct<>" not in str(array.type) else odd))
        except (pa.ArrowException, OverflowError):
            arrays.append(draw.choice(odd))
    table = pa.table(arrays, names)
    if draw.random() < 0.3:
        datasets.Dataset(table).to_parquet(path)
    else:
        parquet.write_table(table, path, row_group_size=draw.choice([2, 100]))
    return [array.to_pylist() for array in arrays]


def read_or_refused(path):
    try:
        return tables.read_examples(path), ""
    except ValueError as error:
        return None, str(error)


def check_table(seed: int, folder) -> None:
    draw = random.Random(seed)
    rows, names = draw.choice([1, 1, 2, 3, 7, 20]), header(draw)
    suffix = draw.choice([".csv", ".tsv", ".json", ".jsonl", ".parquet"])
    path = folder / f"table{suffix}"
    if suffix in (".csv", ".tsv"):
        columns = [[word(draw) for _ in range(rows)] for _ in names]
        write_csv(draw, path, names, columns)
    elif suffix == ".parquet":
        columns = write_parquet(draw, path, names, [column(draw, rows) for _ in names])
    else:
        columns = [column(draw, rows) for _ in names]
        write_json(draw, path, names, columns)
    content, spoilt = path.read_bytes(), None
    if suffix != ".parquet":
        text = content.decode("utf-8")
        content = text.encode(draw.choice(ENCODINGS))
        if draw.random() < 0.2:
            spoilt, content = draw.choice(
                [
                    ("compressed", gzip.compress(content)),
                    ("is not (a text file|valid UTF-8 text)", text.encode("utf-16-le")),
                    ("is not (a text file|valid UTF-8 text)", (text + "é").encode("latin-1", "replace")),
                ]
            )
    if spoilt is None and draw.random() < 0.2:  # what damage leaves may still be a table
        spoilt, place = "", draw.randrange(len(content))
        byte = bytes([draw.randrange(256)])
        content = draw.choice([content[:place], content[:place] + byte + content[place + 1 :]])
    path.write_bytes(content)
    dataset, refused = read_or_refused(path)
    if dataset is None:
        assert spoilt is not None, (seed, refused)
        assert str(path) in refused, (seed, refused)
        assert re.search(spoilt, refused), (seed, refused)
        return
    assert not spoilt, seed
    if spoilt is None:
        assert dataset.column_names == names, seed
        for name, written in zip(names, columns, strict=True):
            read = tables.read_column(dataset, name)
            assert len(read) == len(written), (seed, name, read, written)
            for one, other in zip(read, written, strict=True):
                assert repr(one) == repr(other) if suffix == ".parquet" else same(one, other), (seed, name, one, other)


def check_texts(seed: int, folder) -> None:
    """A folder of texts: line ends become those of Python."""
    draw = random.Random(seed)
    written, good = [], True
    for i in range(draw.randrange(1, 5)):
        file = folder / f"{seed}" / draw.choice(["a", "é b"]) / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "a" + "".join(draw.choices(STRINGS, k=draw.randrange(20)))
        encoding = draw.choice([*ENCODINGS, "latin-1"])
        file.write_bytes(content := text.encode(encoding, "replace"))
        good, text = good and (encoding != "latin-1" or content.isascii()), content.decode(encoding)
        written.append((file.parent.name, "\n".join(text.replace("\r\n", "\n").split("\r"))))
    read, refused = read_or_refused(folder / f"{seed}")
    assert (read is not None) == good, (seed, refused)
    assert good or "is not valid UTF-8 text" in refused, (seed, refused)
    assert not good or sorted(zip(read["label"], read["text"], strict=True)) == sorted(written), seed


@pytest.mark.parametrize("seed", range(30))
def test_some_odd_tables(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH", 3)
    check_table(seed, tmp_path)
    check_texts(seed, tmp_path)


@pytest.mark.slow
def test_fuzz_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH", 3)
    for seed in seeds():
        check_table(seed, tmp_path)
        check_texts(seed, tmp_path)
