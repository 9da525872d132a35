"""The page and the command over a run that is made up."""

from __future__ import annotations

import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.results import ShardStats
from dspark_batch.cli import run_cli
from dspark_batch.errors import ConfigError, OutputError
from dspark_batch.job.drive import Ending
from dspark_batch.report.charts import TIME_STEPS_S, WIDTH, format_time, position_chart, time_chart
from dspark_batch.report.page import ENDINGS, draw_page, state_of
from dspark_batch.report.records import RunRecords, read_run

Capture = pytest.CaptureFixture[str]
HOSTILE = """<script>alert("x")</script>&'"{{ 7 * 7 }}"""
STATS = ShardStats(
    num_rows=1000,
    num_output_rows=1000,
    num_failed_rows=4,
    num_retryable_rows=1,
    num_copied_rows=30,
    num_prompt_tokens=40_000,
    num_generated_tokens=12_000,
    num_rounds=4_000,
    num_drafted_tokens=12_000,
    num_accepted_tokens=8_000,
    num_failed_by_code={"null_prompt": 1, HOSTILE: 3},
)


def entry(number: int, stats: ShardStats = STATS) -> ManifestEntry:
    return ManifestEntry(
        shard=f"part-{number:05d}-0000abcd",
        fingerprint="f",
        run_id="r1",
        file="part.parquet",
        size_bytes=1,
        sha256="0",
        stats=stats,
        versions={},
        finished_at="2026-05-28T20:30:00.000+00:00",
    )


@pytest.fixture
def run(make_engine) -> RunRecords:
    engine = replace(make_engine(0), host=HOSTILE, hardware=HOSTILE)
    start = {
        "finished_at": "2026-05-28T20:30:00.000+00:00",
        "ending": HOSTILE,
        "backend": HOSTILE,
        "elapsed_s": 100.0,
        "done": {"num_rows": 1000, "num_generated_tokens": 12_000},
    }
    return RunRecords(
        path=f"/data/{HOSTILE}",
        fingerprint="f",
        config={"model": {"target": HOSTILE}, "input": {"path": [HOSTILE]}, "prompt": {"template": "secret"}},
        entries=[entry(0), entry(1)],
        engines=[engine, make_engine(86_400)],
        starts=[start],
        num_open_shards=3,
        is_finished=False,
        is_overwriting=False,
    )


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_page_has_the_numbers_of_the_run(run: RunRecords) -> None:
    page = Tags(draw_page(run, price=2.5))
    assert "not finished: 2 shards committed, 3 to do" in page.text
    assert "rows 2,000 8 failed (0.4 %); 60 took the result of an equal prompt" in page.text
    assert "generated tokens 24,000 80,000 prompt tokens" in page.text
    # Two engines for 110 s each, of which 10 s loading.
    assert "engine-hours 0.0611 30.6 2.55" in page.text
    assert "price at 2.5 an hour 0.153 76.4 6.37" in page.text
    assert "prompt tokens 80,000 40,000,000 3,333,333" in page.text
    assert "tokens per second 120 of an engine" in page.text
    assert "accepted length 3.00" in page.text
    assert "null_prompt 2 0.10 %" in page.text
    assert "1 pause without an engine cut out" in page.text
    assert "position 3: 0 of 8,000 verified tokens accepted" in page.text
    assert page.tags.count("svg") == 4
    assert "secret" not in page.text


def test_hostile_text_comes_out_as_text_and_nothing_is_fetched(run: RunRecords) -> None:
    text = draw_page(run)
    page = Tags(text)
    assert not {"script", "img", "link", "iframe", "a"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 6
    assert "http" not in text
    assert draw_page(replace(run, path="/data/\udcff")).encode()


def test_the_settings_say_what_is_done_with_each_row(run: RunRecords) -> None:
    assert "task classify" in Tags(draw_page(replace(run, config={"task": "classify"}))).text


def test_keys_in_uris_are_left_out(run: RunRecords) -> None:
    config = {"input": {"path": ["s3://me:geheim@in/a", "s3://in/b@c"]}}
    page = draw_page(replace(run, path="s3://me:geheim@out/x", config=config))
    assert "geheim" not in page
    assert "s3://***@out/x" in page
    assert "s3://in/b@c" in page


def test_a_run_before_its_first_commit_and_one_of_engines_that_told_nothing_have_a_page(run: RunRecords) -> None:
    begun = replace(run, entries=[], engines=[], starts=[])
    page = Tags(draw_page(begun, price=2.0))
    assert "rows 0 0 failed (0.0 %)" in page.text
    assert "No engine has noted what it did" in page.text
    assert "engine-hours –" not in page.text
    untold = Tags(draw_page(replace(run, engines=[])))
    assert "generated tokens 24,000 12,000,000 1,000,000" in untold.text
    assert "svg" not in untold.tags


def test_every_figure_is_well_formed(run: RunRecords, make_engine) -> None:
    nights = replace(run, engines=[make_engine(90_000 * night, num_steps=1 + 700 * night) for night in range(9)])
    for records in (run, nights):
        page = draw_page(records)
        figures = page.split("<svg ")[1:]
        assert len(figures) == 4
        for figure in figures:
            xml.dom.minidom.parseString("<svg " + figure.split("</svg>")[0] + "</svg>")
            assert "nan" not in figure


def test_charts_have_round_ticks_and_break_where_there_is_no_value() -> None:
    chart = time_chart("t", {"a": [1.0, None, 3.7]}, about="", total_s=4000)
    assert [tick.label for tick in chart.x_ticks] == ["0", "10m", "20m", "30m", "40m", "50m", "1h"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert chart.lines[0].path.count("M") == 2
    assert chart.lines[0].path.endswith(f"H{float(chart.right)}")
    cuts = time_chart("t", {"a": [1.0]}, about="", total_s=70, cuts=[(10, "a"), (11, "b"), (60, "c")]).cuts
    assert [cut.label for cut in cuts] == ["a", "", "c"]
    flat = time_chart("t", {"a": [0.0]}, about="", total_s=0.02)
    assert [tick.label for tick in flat.y_ticks] == ["0"]
    for total_s in (1.5, 59, 3600, 86_400, 40 * 86_400, 900 * 86_400):
        ticks = time_chart("t", {"a": [1.0]}, about="", total_s=total_s).x_ticks
        assert 2 <= len(ticks) <= 9
        assert all(tick.at <= WIDTH for tick in ticks)
    assert [format_time(seconds) for seconds in (0, 90, 5400)] == ["0", "1m 30s", "1h 30m"]
    assert list(TIME_STEPS_S) == sorted(TIME_STEPS_S)


def test_a_bar_is_as_high_as_its_share() -> None:
    chart = position_chart("p", [(4, 4), (4, 1), (0, 0)], about="")
    full, quarter, none = chart.bars
    assert full.height == pytest.approx(chart.bottom - chart.top)
    assert quarter.height == pytest.approx(full.height / 4)
    assert (none.height, none.value, quarter.value) == (0, "", "25")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: Capture) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="holds no run"):
            read_run(str(path))
        assert run_cli(["report", str(path)]) == 2
        assert f"{str(path)!r} holds no run" in capsys.readouterr().err


def test_a_file_is_no_run(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "label.yaml"
    config.write_text("output: {path: out}")
    assert run_cli(["report", str(config)]) == 2
    assert f"{str(config)!r} is a file, not the folder of a run" in capsys.readouterr().err


def test_a_run_in_which_too_many_rows_failed_is_told_from_one_that_goes_on(run: RunRecords) -> None:
    complete = replace(run, entries=run.entries[:1], num_open_shards=0)
    assert state_of(complete) == "not finished: 1 shard committed, and the output is not marked as done"
    failed = replace(complete, config={"limits": {"max_failed_fraction": 0.001}})
    allowed = "more than limits.max_failed_fraction=0.001 allows"
    assert state_of(failed) == f"not done, too many rows failed ({allowed}); 1 shard committed, none to do"


def test_every_way_in_which_a_start_ends_is_put_in_words() -> None:
    assert set(ENDINGS) == set(Ending)


def test_damaged_state_is_named_by_its_file(tmp_path: Path) -> None:
    RunStore(str(tmp_path)).open({"a": 1})
    for name in ("metrics.jsonl", "run.yaml", "work/a.json", "manifest/part.json"):
        file = tmp_path / "_dspark" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("{")
        with pytest.raises(OutputError, match=name):
            read_run(str(tmp_path))
        file.unlink()


def test_entries_of_another_fingerprint_do_not_count(tmp_path: Path) -> None:
    run = RunStore(str(tmp_path))
    run.open({"a": 1})
    ours = replace(entry(0), fingerprint=run.ticket.fingerprint)
    for one in (ours, entry(1)):
        run.write_meta(f"manifest/{one.shard}.json", one.to_json())
    assert read_run(str(tmp_path)).entries == [ours]


def test_the_command_prints_the_figures_and_writes_the_page(tmp_path: Path, make_engine, capsys: Capture) -> None:
    out = tmp_path / "out"
    run = RunStore(str(out))
    run.open({"a": 1})
    one = replace(entry(0), fingerprint=run.ticket.fingerprint)
    run.write_meta(f"manifest/{one.shard}.json", one.to_json())
    assert run_cli(["report", str(out)]) == 0
    assert "engine-hours and price: not known" in capsys.readouterr().out
    run.write_meta("work/a.json", make_engine(0).to_json())
    page = tmp_path / "page.html"
    assert run_cli(["report", str(out), "--html", str(page), "--price-per-engine-hour", "36"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "rows 1,000" in text
    assert "failed rows 4" in text
    assert "engine-hours 0.0306 30.6 2.55" in text
    assert "price at 36 an hour 1.1 1,100 91.7" in text
    assert "accepted by draft position, in %: 100 100 0" in text
    assert f"page: {page}" in text
    assert "<svg" in page.read_text()
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path, problem in (
        (blocked / "a" / "x.html", f"'{blocked}' is a file; choose another path"),
        (tmp_path, f"'{tmp_path}' is a folder; name a file, such as '{tmp_path}/report.html'"),
    ):
        assert run_cli(["report", str(out), "--html", str(path)]) == 2
        out_text, err = capsys.readouterr()
        assert (out_text, "Errno" in err) == ("", False)
        assert f"--html: '{path}'" in err
        assert problem in err
    assert run_cli(["report", str(out), "--html", str(tmp_path / "new" / "x.html")]) == 0
