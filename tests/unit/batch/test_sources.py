from __future__ import annotations

from pathlib import Path

import pytest

from dspark_batch.batch.sources import find_input_files
from dspark_batch.errors import InputError
from dspark_batch.job.config import InputSection


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = ["b.parquet", "a.parquet", "deep/c.parquet", "deep/x/d.parquet", "_dspark/e.parquet", ".h.parquet", "n.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    return tmp_path


def found(path, **rest) -> list[str]:
    return [file.relative for file in find_input_files(InputSection(path=path, **rest)).files]


def test_a_folder_is_searched_to_the_bottom_and_hidden_names_are_skipped(tree):
    assert found(str(tree)) == ["a.parquet", "b.parquet", "deep/c.parquet", "deep/x/d.parquet"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("[!a].parquet", ["b.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("**/*.parquet", ["a.parquet", "b.parquet", "deep/c.parquet", "deep/x/d.parquet"]),
        ("deep/*.parquet", ["c.parquet"]),
        ("d*/c.parquet", ["deep/c.parquet"]),
    ],
)
def test_globs_match_whole_path_parts(tree, pattern, names):
    assert found(f"{tree}/{pattern}") == names


def test_a_uri_is_resolved_by_its_filesystem(tree):
    assert found(f"file://{tree}/a.parquet") == ["a.parquet"]
    assert found(f"file://{tree}/*.parquet") == ["a.parquet", "b.parquet"]


def test_files_of_one_name_in_listed_folders_keep_apart(tmp_path):
    for folder in ("mon", "tue"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}\n")
    names = found([f"{tmp_path}/tue/x.jsonl", f"{tmp_path}/mon/x.jsonl", f"{tmp_path}/mon"])
    assert names == ["mon/x.jsonl", "tue/x.jsonl"]


def test_relative_names_do_not_depend_on_which_files_are_there(tree):
    before = set(found(f"{tree}/*.parquet"))
    (tree / "b.parquet").unlink()
    assert set(found(f"{tree}/*.parquet")) < before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nope.parquet", "no such file"),
        ("*.csv", "no file matches"),
        ("n.txt", "set input.format"),
        ("deep/x/_", "no such"),
    ],
)
def test_what_is_not_there_is_an_input_error(tree, name, reason):
    with pytest.raises(InputError, match=reason):
        found(f"{tree}/{name}")


def test_mixed_formats_and_empty_folders_are_input_errors(tree):
    (tree / "z.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="mixes formats"):
        found(str(tree))
    assert found(str(tree), format="jsonl") == ["z.jsonl"]
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match="no file ending in"):
        found(str(tree / "empty"))
    with pytest.raises(InputError, match="empty list"):
        found([])


def test_compressed_text_files_are_found_and_other_compressed_files_are_refused_by_name(tmp_path):
    for name in ("a.csv", "b.CSV.gz", "c.tsv.zst", "d.csv.bz2", "e.jsonl.gz", "f.txt.gz"):
        (tmp_path / name).write_bytes(b"1")
    assert found(str(tmp_path), format="csv") == ["a.csv", "b.CSV.gz", "c.tsv.zst", "d.csv.bz2"]
    assert found(str(tmp_path), format="jsonl") == found(f"{tmp_path}/*.jsonl.gz") == ["e.jsonl.gz"]
    (tmp_path / "x.csv.xz").write_bytes(b"1")
    (tmp_path / "y.parquet.gz").write_bytes(b"1")
    with pytest.raises(InputError, match=r"cannot be read as they are:\s+\S+x\.csv\.xz\s+decompress them"):
        found(str(tmp_path), format="csv")
    with pytest.raises(InputError, match=r"x\.csv\.xz\s+\S+y\.parquet\.gz"):
        found(str(tmp_path))
    assert found(str(tmp_path), format="jsonl") == ["e.jsonl.gz"]
