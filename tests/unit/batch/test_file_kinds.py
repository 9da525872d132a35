"""CSV, Arrow IPC, Hive partitions and saved datasets: every row once, whatever the cut."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch import ranges
from dspark_batch.batch.prompts import PromptRenderer
from dspark_batch.batch.ranges import open_text
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import Plan, make_plan
from dspark_batch.batch.sources import find_input_files
from dspark_batch.core import ErrorCode, RowError, SamplingParams
from dspark_batch.errors import InputError
from dspark_batch.job.config import InputSection


def read_all(config, *, max_rows: int) -> tuple[Plan, pa.Table]:
    plan = make_plan(config.input, max_rows=max_rows)
    assert Plan.from_json(plan.to_json(), source="here") == plan
    assert all(shard.num_rows <= max_rows for shard in plan.shards)
    reader = ShardReader(config, plan_schema=plan.schema)
    order = list(range(len(plan.shards)))
    random.Random(1).shuffle(order)
    tables = {place: reader.read(plan.shards[place]).table for place in order}
    reader.close()
    return plan, pa.concat_tables([tables[place] for place in sorted(tables)])


def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir(exist_ok=True)
    return tmp_path / "in"


@pytest.mark.parametrize("max_rows", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("suffix", "delimiter", "end"), [("csv", ",", "\n"), ("tsv", "\t", "\r\n"), ("csv", ";", "\n")]
)
def test_csv_records_with_quotes_and_line_ends_come_out_once(make_config, tmp_path, max_rows, suffix, delimiter, end):
    rng = random.Random(max_rows)
    pieces = ["plain", 'say "hi"', "two\nlines", f"a{delimiter}b", "", '"', "größe", '5" pipe', "tail\n"]
    rows = [{"text": "".join(rng.choices(pieces, k=2)) or "x", "n": n} for n in range(23)]
    with (folder(tmp_path) / f"a.{suffix}").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    _, table = read_all(make_config(input={"delimiter": delimiter}), max_rows=max_rows)
    assert table.to_pylist() == rows
    assert table.schema.field("n").type == pa.int64()


def test_csv_with_a_bare_quote_in_an_unquoted_field_and_a_byte_order_mark(make_config, tmp_path):
    (folder(tmp_path) / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\n5\" pipe,1\n\n6' rod,2\n")
    _, table = read_all(make_config(), max_rows=1)
    assert table.to_pylist() == [{"text": '5" pipe', "n": 1}, {"text": "6' rod", "n": 2}]


def test_csv_columns_whose_rows_disagree_are_text_and_dates_stay_text(make_config, tmp_path):
    text = "text,a,b,day,none\nx,1,1,2026-01-31,\ny,2,q,2026-02-01,\nz,,3,,\n"
    (folder(tmp_path) / "a.csv").write_text(text)
    plan, table = read_all(make_config(), max_rows=1)
    kinds = {field.name: field.type for field in plan.schema}
    assert (kinds["a"], kinds["b"], kinds["day"]) == (pa.int64(), pa.string(), pa.string())
    assert table["a"].to_pylist() == [1, 2, None]
    assert table["b"].to_pylist() == ["1", "q", "3"]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (["1", "-20", "", "9223372036854775807"], pa.int64()),
        (["1.5", "0.1", "-2.0", "", "1e-07", "0.30000000000000004"], pa.float64()),
        (["inf", "nan", "0.5", "-inf"], pa.float64()),
        (["true", "", "False", "TRUE"], pa.bool_()),
        (["", ""], pa.null()),
        (["01234", "12345"], pa.string()),
        (["12345678901234567890", "12345678901234567891"], pa.string()),
        (["1", "12345678901234567890"], pa.string()),
        (["1.50", "2.25"], pa.string()),
        (["1", "2.5", ""], pa.string()),
        (["1E5", "2E5"], pa.string()),
        (["+49301234567", "+49301234568"], pa.string()),
        (["0x10", "0x11"], pa.string()),
        (["1", "NA", "NULL"], pa.string()),
        (["NA", "nan", "N/A"], pa.string()),
        (["true", "yes"], pa.string()),
        ([" 1", "2 "], pa.string()),
        (["10:20", "2026-01-31T10:20:00Z"], pa.string()),
    ],
)
@pytest.mark.parametrize("max_rows", [1, 100])
def test_csv_values_print_as_the_fields_they_come_from(make_config, tmp_path, fields, kind, max_rows):
    lines = [f"t,{field}\n" for field in fields]
    (folder(tmp_path) / "a.csv").write_text("text,a\n" + "".join(lines))
    (folder(tmp_path) / "b.csv").write_text("text,a\n" + "".join(reversed(lines)))
    plan, table = read_all(make_config(), max_rows=max_rows)
    assert plan.schema.field("a").type == kind
    assert table["text"].to_pylist() == ["t"] * (2 * len(fields))
    printed = ["" if value is None else str(value) for value in table["a"].to_pylist()]
    expected = [field.capitalize() for field in fields] if kind == pa.bool_() else fields
    assert printed == expected + expected[::-1]


def test_csv_files_that_read_as_other_types_are_one_table(make_config, tmp_path):
    for name, field in (("a", "12345"), ("b", "01234"), ("c", "")):
        (folder(tmp_path) / f"{name}.csv").write_text(f"text,zip\nt,{field}\n")
    (folder(tmp_path) / "d.csv").write_text("zip,text,more\n7,t,1\n")
    _, table = read_all(make_config(), max_rows=5)
    assert table["zip"].to_pylist() == ["12345", "01234", "", "7"]
    assert table["more"].to_pylist() == [None, None, None, 1]


@pytest.mark.parametrize("max_rows", [1, 100])
def test_a_csv_row_that_is_not_utf8_fails_alone(make_config, tmp_path, max_rows):
    (folder(tmp_path) / "a.csv").write_bytes(b'text,n\nhello,1\nl\xe9l\xe9phant,2\n"gr\xc3\xb6\xc3\x9fe",3\n')
    config = make_config(prompt={"template": "{{ text }}"}, input={"id": "n", "filter": "n > 0"})
    plan = make_plan(config.input, max_rows=max_rows)
    reader = ShardReader(config, plan_schema=plan.schema)
    renderer = PromptRenderer(
        config.prompt, sampling=SamplingParams(), input_schema=reader.schema, has_chat_template=False
    )
    shards = [reader.read(shard) for shard in plan.shards]
    made = [row for shard in shards for row in renderer.render_table(shard.table, ids=shard.ids)]
    assert [row.code if isinstance(row, RowError) else row.prompt for row in made] == [
        "hello",
        ErrorCode.UNDECODABLE_TEXT,
        "größe",
    ]


def test_a_csv_file_of_a_header_alone_is_an_empty_table(make_config, tmp_path):
    (folder(tmp_path) / "a.csv").write_text("text,n\n")
    config = make_config(input={"filter": "n > 1 and text in ['a'] and not n == 2"})
    plan = make_plan(config.input, max_rows=5)
    assert (plan.schema.names, plan.shards) == (["text", "n"], ())
    assert ShardReader(config, plan_schema=plan.schema).schema.names == ["text", "n"]
    (folder(tmp_path) / "b.csv").write_text("text,n\na,3\n")
    plan, table = read_all(config, max_rows=5)
    assert table.to_pylist() == [{"text": "a", "n": 3}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,a\n1,2\n", "must name every column, each once"),
        ("a,b\n1,2\n1,2,3\n", r"a\.csv, rows from 1"),
        ("größe,b\n1,2\n", r"a\.csv: the header is not UTF-8"),
    ],
)
def test_a_broken_csv_file_is_named(tmp_path, text, reason):
    (folder(tmp_path) / "a.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(InputError, match=reason):
        make_plan(InputSection(path=str(tmp_path / "in")), max_rows=1)


def compressed(data: bytes, *, end: str) -> bytes:
    """In two streams one after the other, as tools write them that append."""
    codec = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}[end]
    parts = []
    for part in (data[: len(data) // 3], data[len(data) // 3 :]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(part)
        parts.append(sink.getvalue().to_pybytes())
    return b"".join(parts)


@pytest.mark.parametrize("max_rows", [1, 7, 100])
@pytest.mark.parametrize("end", ["gz", "bz2", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_compressed_text_files_are_read_as_what_they_hold(make_config, tmp_path, kind, end, max_rows):
    rows = [{"text": f"größe {n}", "n": n} for n in range(23)]
    delimiter = "\t" if kind == "tsv" else ","
    lines = [json.dumps(row) if kind == "jsonl" else f"{row['text']}{delimiter}{row['n']}" for row in rows]
    header = [] if kind == "jsonl" else [f"text{delimiter}n"]
    data = "".join(f"{line}\n" for line in header + lines).encode()
    for name in ("a", "b"):
        (folder(tmp_path) / f"{name}.{kind}.{end}").write_bytes(compressed(data, end=end))
    plan, table = read_all(make_config(), max_rows=max_rows)
    assert table.to_pylist() == rows * 2
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    assert pa.concat_tables([reader.read(shard).table for shard in plan.shards]).to_pylist() == rows * 2
    reader.close()


def test_shards_in_order_share_one_pass_over_a_compressed_file(make_config, tmp_path, monkeypatch):
    data = "".join(f'{{"text": "{n}"}}\n' for n in range(50)).encode()
    (folder(tmp_path) / "a.jsonl.gz").write_bytes(compressed(data, end="gz"))
    plan = make_plan(make_config().input, max_rows=5)
    opened = []
    monkeypatch.setattr(ranges, "open_text", lambda used, path: opened.append(path) or open_text(used, path))
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    texts = [text for shard in plan.shards[::2] for text in reader.read(shard).table["text"].to_pylist()]
    reader.close()
    assert texts == [str(n) for n in range(50) if n // 5 % 2 == 0]
    assert len(opened) == 1


def test_a_compressed_file_that_ends_early_is_named(tmp_path):
    data = compressed(b'{"text": "a"}\n' * 50, end="gz")
    (folder(tmp_path) / "a.jsonl.gz").write_bytes(data[:-9])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read as JSON lines"):
        make_plan(InputSection(path=str(tmp_path / "in")), max_rows=5)


@pytest.mark.parametrize("max_rows", [1, 4, 11, 100])
@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_arrow_files_and_streams_are_read_by_rows(make_config, tmp_path, max_rows, kind):
    table = pa.table({"text": [f"t{n}" for n in range(37)], "n": range(37), "unused": ["u"] * 37})
    path = folder(tmp_path) / "a.arrow"
    if kind == "feather":
        feather.write_feather(table, str(path), compression="zstd", chunksize=5)
    else:
        make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            for start, stop in ((0, 0), (0, 5), (5, 6), (6, 30), (30, 37)):
                writer.write_table(table.slice(start, stop - start))
    config = make_config(input={"columns": ["n"]})
    _, found = read_all(config, max_rows=max_rows)
    assert found["n"].to_pylist() == list(range(37))
    assert found.column_names == ["text", "n"]


def test_folder_names_become_columns(make_config, tmp_path):
    for place, names in enumerate(
        ("country=de/day=1", "country=a%20b/day=2", "country=__HIVE_DEFAULT_PARTITION__/day=3")
    ):
        (folder(tmp_path) / names).mkdir(parents=True)
        pq.write_table(pa.table({"text": [f"t{place}"]}), folder(tmp_path) / names / "x.parquet")
    config = make_config(input={"filter": "day >= 2"})
    plan = make_plan(config.input, max_rows=5)
    assert plan.schema.field("day").type == pa.int64()
    reader = ShardReader(config, plan_schema=plan.schema)
    rows = [row for shard in plan.shards for row in reader.read(shard).table.to_pylist()]
    assert sorted(rows, key=lambda row: row["day"]) == [
        {"text": "t1", "country": "a b", "day": 2},
        {"text": "t2", "country": None, "day": 3},
    ]


def test_a_run_that_reads_only_partition_columns_has_every_row(make_config, tmp_path):
    (folder(tmp_path) / "day=1").mkdir()
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), folder(tmp_path) / "day=1" / "x.parquet")
    config = make_config(input={"columns": ["day"]}, prompt={"template": "{{ day }}"})
    _, table = read_all(config, max_rows=2)
    assert table.to_pylist() == [{"day": 1}] * 3


def save_dataset(path: Path, *, indices: bool = False) -> None:
    path.mkdir(parents=True)
    names = [f"data-{place:05d}-of-00002.arrow" for place in range(2)]
    for place, name in enumerate(names):
        table = pa.table({"text": [f"t{place}.{n}" for n in range(4)]})
        with pa.ipc.new_stream(str(path / name), table.schema) as writer:
            writer.write_table(table)
    (path / "cache-123.arrow").write_bytes(b"junk")
    state = {"_data_files": [{"filename": name} for name in names], "_indices_files": None}
    if indices:
        state["_indices_files"] = [{"filename": "indices.arrow"}]
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("format", [None, "huggingface"])
def test_a_saved_dataset_is_read_by_its_state_file(make_config, tmp_path, format):
    save_dataset(tmp_path / "in")
    _, table = read_all(make_config(input={"format": format}), max_rows=3)
    assert table["text"].to_pylist() == [f"t{place}.{n}" for place in range(2) for n in range(4)]


def test_a_dataset_of_several_splits_or_with_a_selection_is_refused_with_what_to_do(tmp_path):
    save_dataset(tmp_path / "d" / "train", indices=True)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"holds the splits train, test; set input\.path to one of them"):
        find_input_files(InputSection(path=str(tmp_path / "d")))
    with pytest.raises(InputError, match="flatten_indices"):
        find_input_files(InputSection(path=str(tmp_path / "d" / "train")))
