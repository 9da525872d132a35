"""Kills the driver, an actor or a node of table jobs at random moments, into every sink, and counts what that costs.

``python -m dspark_batch.bench.kill_matrix --runs 216 --records FILE`` starts a Ray cluster of two nodes on this machine
and, run by run, a small job on it. A process of the job gets SIGKILL or SIGTERM at a drawn moment; the same command is
given again until it ends well, and the table must then hold every row once, with the values of an undisturbed run.
Every run adds a line of JSON to ``--records``; ``--resume`` goes on after those that are there. Exit status 1 if a row
was lost, doubled or changed, a stray file counted as data, or a run did not end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_batch.testing.kill_job import Engine, Rows
    from dspark_batch.testing.kill_runs import KillRecord, Phase
    from dspark_batch.testing.ray_nodes import TwoNodes

RUNS_PER_CLUSTER = 54
"""A cluster is replaced after so many runs, so that what it remembers of ended jobs does not slow the later ones."""
MAX_CLUSTER_FAILURES = 3
"""In a row, before the command gives up."""
PAUSE_POLL_S = 2.0
COLUMNS = (
    "engine",
    "killed",
    "signal",
    "sink",
    "runs",
    "hits",
    "restarts",
    "lost",
    "doubled",
    "changed",
    "strays counted",
    "strays left",
    "not ended",
)


def read_records(path: Path) -> list[KillRecord]:
    """The runs that a file of JSON lines holds; a last line that was cut off by a kill is left out."""
    from dspark_batch.testing.kill_job import Audit
    from dspark_batch.testing.kill_runs import KillPlan, KillRecord

    records: list[KillRecord] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        audit = None if values["audit"] is None else Audit(**values["audit"])
        values |= {name: tuple(values[name]) for name in ("exit_codes", "last_words")}
        records.append(KillRecord(**{**values, "plan": KillPlan(**values["plan"]), "audit": audit}))
    return records


def append_record(path: Path, record: KillRecord) -> None:
    """Add a run to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def summary_table(records: Iterable[KillRecord]) -> str:
    """A Markdown table: one line per engine, target, signal and sink, and the sums."""
    cells: dict[tuple[str, ...], list[KillRecord]] = {}
    everything: list[KillRecord] = []
    for record in records:
        plan = record.plan
        cells.setdefault((plan.engine, plan.target, plan.signal, plan.sink), []).append(record)
        everything.append(record)
    keys = sorted(cells, key=lambda key: (key[0] != "scripted", key))
    lines = [[*key, *_counts(cells[key])] for key in keys]
    return _markdown(COLUMNS, [*lines, ["all", "", "", "", *_counts(everything)]])


def phase_table(records: Iterable[KillRecord]) -> str:
    """A Markdown table: where the jobs were when the signals were sent, and whether the processes ended of them."""
    phases: tuple[Phase, ...] = ("starting", "working", "ending", "ended")
    groups: dict[tuple[str, str], list[KillRecord]] = {}
    for record in records:
        groups.setdefault((record.plan.target, record.plan.signal), []).append(record)
    lines = [
        [
            *key,
            *(sum(record.phase == phase for record in groups[key]) for phase in phases),
            f"{sum(record.victim_ended is True for record in groups[key])} of "
            f"{sum(record.victim_ended is not None for record in groups[key])}",
        ]
        for key in sorted(groups)
    ]
    return _markdown(("killed", "signal", *phases, "the process ended before its job"), lines)


def problem_lines(records: Iterable[KillRecord]) -> list[str]:
    """One line for every run that is not clean."""
    return [
        f"run {record.plan.run} ({record.plan.engine}, {record.plan.target} {record.plan.signal}, {record.plan.sink}): "
        f"{record.problem or record.audit}"
        for record in records
        if not record.is_clean
    ]


def restart_lines(records: Iterable[KillRecord]) -> list[str]:
    """One line for every run in which the command had to be given again although its driver was not killed."""
    return [
        f"run {record.plan.run} ({record.plan.engine}, {record.plan.target} {record.plan.signal}, {record.plan.sink}, "
        f"{record.plan.num_actors} actors): exit codes {list(record.exit_codes)}; {' / '.join(record.last_words[:-1])}"
        for record in records
        if record.plan.target != "driver" and record.num_restarts
    ]


def report(records: Sequence[KillRecord]) -> str:
    """Both tables and the list of what went wrong, as Markdown."""
    minutes = sum(record.elapsed_s for record in records) / 60
    num_hits = sum(record.is_hit for record in records)
    num_restarts = sum(record.num_restarts for record in records)
    problems = problem_lines(records)
    parts = [
        f"{len(records)} runs in {minutes:.0f} minutes, {num_hits} kills while the job was under way, "
        f"{num_restarts} restarts of the command.",
        summary_table(records),
        "Where the job was when the signal was sent (`ended`: the kill came too late and hit nothing):",
        phase_table(records),
        "No row was lost, doubled or changed, no stray file counted as data, and every run ended."
        if not problems
        else "What went wrong:\n\n" + _list(problems),
    ]
    if unforced := restart_lines(records):
        parts.append("Restarts although the driver was not killed:\n\n" + _list(unforced))
    return "\n\n".join(parts) + "\n"


class KillMatrix:
    """Carries out runs, on a cluster that is replaced now and then, and after a run that did not end."""

    def __init__(self, folder: Path, *, seed: int, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._seed = seed
        self._tell = tell
        self._expected: dict[Engine, Rows] = {}

    def run(self, todo: Sequence[tuple[Engine, int]], *, records: Path, pause_file: Path | None = None) -> None:
        """Do these runs (engine, number) and add each to ``records``; wait between them while ``pause_file`` exists."""
        from dspark_batch.testing.engine_factories import STEP_DELAY_VARIABLE
        from dspark_batch.testing.kill_job import STEP_DELAY_S
        from dspark_batch.testing.ray_nodes import two_nodes

        waiting = list(todo)
        num_failures = 0
        while waiting:
            _wait_while(pause_file)
            try:
                with two_nodes({STEP_DELAY_VARIABLE: str(STEP_DELAY_S)}) as nodes:
                    for place in range(min(RUNS_PER_CLUSTER, len(waiting))):
                        if place:
                            _wait_while(pause_file)
                        record = self._once(*waiting[0], nodes=nodes)
                        append_record(records, record)
                        waiting.pop(0)
                        self._tell(_line(record, num_left=len(waiting)))
                        if record.problem is not None:
                            break
                    num_failures = 0
            except Exception as error:
                num_failures += 1
                self._tell(f"the cluster failed, another one is tried: {type(error).__name__}: {error}")
                if num_failures == MAX_CLUSTER_FAILURES:
                    raise

    def _once(self, engine: Engine, number: int, *, nodes: TwoNodes) -> KillRecord:
        from dspark_batch.testing.kill_job import undisturbed_rows
        from dspark_batch.testing.kill_runs import kill_run, plan_run

        if engine not in self._expected:
            self._expected[engine] = undisturbed_rows(self._new_folder(f"undisturbed-{engine}"), engine=engine)
        return kill_run(
            plan_run(number, seed=self._seed, engine=engine),
            nodes=nodes,
            folder=self._new_folder(f"{engine}-{number}"),
            expected=self._expected[engine],
            patience_s=120.0 if engine == "scripted" else 300.0,
        )

    def _new_folder(self, name: str) -> Path:
        """One that no run before this start had either."""
        return self._folder / f"{name}-{time.time_ns()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left, and write the report of all runs in the file; 0 when all of them are clean."""
    parser = argparse.ArgumentParser(
        prog="python -m dspark_batch.bench.kill_matrix", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=216, help="with the scripted engine; 18 cells take turns")
    parser.add_argument("--model-runs", type=int, default=0, help="further runs with the embedded model in float32")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--records", type=Path, default=Path("out/kill-matrix.jsonl"), help="JSON lines, one per run")
    parser.add_argument("--resume", action="store_true", help="go on after the runs that --records holds")
    parser.add_argument("--report", type=Path, default=None, help="write the report here as Markdown; default: stdout")
    parser.add_argument("--pause-file", type=Path, default=None, help="begin no run while this file exists")
    parser.add_argument("--folder", type=Path, default=None, help="where jobs lie; default: a temporary folder")
    chosen = parser.parse_args(arguments)
    done = read_records(chosen.records)
    if done and not chosen.resume:
        parser.error(f"--records {chosen.records} holds {len(done)} runs; give --resume to go on, or another file")
    known = {(record.plan.engine, record.plan.run) for record in done if record.plan.seed == chosen.seed}
    wanted: list[tuple[Engine, int]] = [("scripted", number) for number in range(chosen.runs)]
    wanted += [("model", number) for number in range(chosen.model_runs)]
    with tempfile.TemporaryDirectory(prefix="dspark-kill", ignore_cleanup_errors=True) as temporary:
        folder = chosen.folder if chosen.folder is not None else Path(temporary)
        matrix = KillMatrix(folder, seed=chosen.seed, tell=_tell)
        todo = [pair for pair in wanted if pair not in known]
        matrix.run(todo, records=chosen.records, pause_file=chosen.pause_file)
    records = read_records(chosen.records)
    text = report(records)
    if chosen.report is None:
        sys.stdout.write(text)
    else:
        chosen.report.write_text(text)
    return 0 if all(record.is_clean for record in records) else 1


def _counts(records: Sequence[KillRecord]) -> list[int]:
    audits = [record.audit for record in records if record.audit is not None]
    return [
        len(records),
        sum(record.is_hit for record in records),
        sum(record.num_restarts for record in records),
        sum(audit.num_lost for audit in audits),
        sum(audit.num_duplicated for audit in audits),
        sum(audit.num_changed for audit in audits),
        sum(audit.num_strays_counted for audit in audits),
        sum(audit.num_stray_files for audit in audits),
        sum(record.problem is not None for record in records),
    ]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _line(record: KillRecord, *, num_left: int) -> str:
    plan = record.plan
    verdict = "clean" if record.is_clean else f"NOT CLEAN: {record.problem or record.audit}"
    return (
        f"{plan.engine} {plan.run}: {plan.target} {plan.signal} {plan.sink} at {record.num_commits_at_kill} commits "
        f"({record.phase}), {record.num_restarts} restarts, {record.elapsed_s:.1f} s, {verdict}; {num_left} left"
    )


def _wait_while(file: Path | None) -> None:
    while file is not None and file.exists():
        time.sleep(PAUSE_POLL_S)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
