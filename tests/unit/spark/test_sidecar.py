"""A real sidecar process on a scripted engine; no JVM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, EngineError, ModelError
from dspark_batch.job.config import JobConfig
from dspark_batch.spark.client import ROW_ID_COLUMN, Chunk, EngineSpec
from dspark_batch.spark.config import SparkSection
from dspark_batch.spark.sidecar.client import SidecarClient
from dspark_batch.spark.sidecar.launch import MAX_SOCKET_PATH_BYTES, SidecarPlace
from dspark_batch.spark.sidecar.server import WATCH_INTERVAL_S
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.processes import is_running, wait_until_gone

NUM_ROWS = 30


@pytest.fixture
def place(tmp_path: Path) -> SidecarPlace:
    return SidecarPlace.of(tmp_path, "engine")


@pytest.fixture
def connect(engine: EngineFolder, place: SidecarPlace) -> Iterator[Callable[..., SidecarClient]]:
    clients: list[SidecarClient] = []

    def make(factory: str = FACTORY, **settings: object) -> SidecarClient:
        spec = EngineSpec(
            config=EngineConfig(target=str(engine.path)),
            settings=SparkSection(sidecar_idle_s=20, **settings),
            factory=factory,
        )
        client = SidecarClient(spec, place=place, environment={"CUDA_VISIBLE_DEVICES": "7"})
        clients.append(client)
        return client

    yield make
    pids = {client.pid for client in clients} | {load["pid"] for load in engine.loads()}
    for client in clients:
        client.close()
    for pid in pids:
        end(pid)


@pytest.fixture
def engine(tmp_path: Path) -> EngineFolder:
    return EngineFolder.make(tmp_path / "engine", step_delay_s=0.01)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def job(**changes: object) -> JobConfig:
    values = {"input": {"path": "-", "columns": []}, "prompt": {"template": "{{ body }}"}, "output": {"path": "-"}}
    return JobConfig(**{**values, **changes})  # type: ignore[arg-type]


def chunk(first: int, num_rows: int = 3, *, of: JobConfig | None = None) -> Chunk:
    rows = range(first, first + num_rows)
    table = pa.table({"body": [f"row {row}" for row in rows], ROW_ID_COLUMN: [str(row) for row in rows]})
    return Chunk(job=of or job(), table=table)


def generated(futures) -> list[str]:
    return [text for future in futures for text in future.result(timeout=60)["generated"].to_pylist()]


def test_clients_share_one_engine_and_get_their_own_rows(connect, engine: EngineFolder) -> None:
    first, second = connect(), connect()
    mine = [first.submit(chunk(row)) for row in range(0, NUM_ROWS, 3)]
    other = job(sampling={"temperature": 0.9, "n": 2})
    theirs = [second.submit(chunk(row, of=other)) for row in range(100, 109, 3)]
    assert len(generated(mine)) == NUM_ROWS
    assert len(generated(theirs)) == 2 * 9
    assert first.pid == second.pid
    assert [load["CUDA_VISIBLE_DEVICES"] for load in engine.loads()] == ["7"]
    assert len(engine.rows()) == NUM_ROWS + 9


def test_clients_that_come_at_once_start_one_sidecar(connect, engine: EngineFolder) -> None:
    threads = [threading.Thread(target=connect) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.loads()) == 1


def test_a_killed_sidecar_is_replaced_and_no_row_is_lost(connect, engine: EngineFolder) -> None:
    clients = [connect(), connect()]
    before = generated([clients[0].submit(chunk(row)) for row in range(0, NUM_ROWS, 3)])
    killed = clients[0].pid
    futures = [[client.submit(chunk(row)) for row in range(0, NUM_ROWS, 3)] for client in clients]
    os.kill(killed, signal.SIGKILL)
    assert [generated(mine) for mine in futures] == [before, before]
    assert {client.pid for client in clients} != {killed}
    assert len(engine.loads()) == 2


def test_an_engine_that_breaks_is_replaced_with_its_process(connect, engine: EngineFolder) -> None:
    EngineFolder.make(engine.path, die_once_after_rows=7)
    client = connect()
    assert len(generated([client.submit(chunk(row)) for row in range(0, NUM_ROWS, 3)])) == NUM_ROWS
    assert client.num_sidecars == 2


def test_a_task_gives_up_after_the_configured_number_of_sidecars(connect) -> None:
    client = connect(sidecar_restarts=0)
    future = client.submit(chunk(0, 300))
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"died 1 times .* log ends"):
        future.result(timeout=60)
    with pytest.raises(EngineError):
        client.submit(chunk(0))


def test_the_reason_why_a_model_does_not_load_reaches_every_client(connect) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="no such checkpoint"):
            connect(factory="dspark_batch.testing.engine_factories:missing")


def test_a_job_that_does_not_fit_the_engine_fails_alone(connect) -> None:
    client = connect()
    wrong = client.submit(chunk(0, of=job(prompt={"template": "{{ body }}", "chat": "always"})))
    right = client.submit(chunk(0))
    with pytest.raises(ConfigError, match="no chat template"):
        wrong.result(timeout=60)
    assert len(generated([right])) == 3


def test_chunks_of_a_client_that_left_do_not_disturb_the_others(connect, engine: EngineFolder) -> None:
    EngineFolder.make(engine.path, step_delay_s=0.02, max_concurrency=2)
    leaving, staying = connect(), connect()
    leaving.submit(chunk(1000, 40))
    leaving.close()
    assert len(generated([staying.submit(chunk(0, 12))])) == 12


def test_an_idle_sidecar_ends_and_the_next_client_starts_another(engine: EngineFolder, place: SidecarPlace) -> None:
    spec = EngineSpec(
        config=EngineConfig(target=str(engine.path)), settings=SparkSection(sidecar_idle_s=0.1), factory=FACTORY
    )
    for number in (1, 2):
        client = SidecarClient(spec, place=place, environment={})
        assert len(generated([client.submit(chunk(0))])) == 3
        pid = client.pid
        client.close()
        wait_until_gone([pid])
        assert len(engine.loads()) == number


def client_script(engine: EngineFolder, place: SidecarPlace) -> str:
    """A process that connects, prints the sidecar's pid, and stays."""
    script = f"""
        import sys, time
        from pathlib import Path
        from dspark_batch.engine.config import EngineConfig
        from dspark_batch.spark.client import EngineSpec
        from dspark_batch.spark.config import SparkSection
        from dspark_batch.spark.sidecar.client import SidecarClient
        from dspark_batch.spark.sidecar.launch import SidecarPlace
        config = EngineConfig(target={str(engine.path)!r})
        spec = EngineSpec(config=config, settings=SparkSection(), factory={FACTORY!r})
        client = SidecarClient(spec, place=SidecarPlace(Path({str(place.folder)!r}), {place.name!r}), environment={{}})
        sys.stdout.write(f"{{client.pid}}\\n")
        sys.stdout.flush()
        time.sleep(600)
    """
    return textwrap.dedent(script)


def test_a_sidecar_ends_with_the_process_group_of_the_daemon(engine: EngineFolder, place: SidecarPlace) -> None:
    """The group's leader stands for Spark's Python daemon; it is killed so hard that it can tell nobody."""
    command = [sys.executable, "-c", client_script(engine, place)]
    leader = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    with leader.stdout:
        pid = int(leader.stdout.readline())
    assert is_running(pid)
    leader.kill()
    leader.wait()
    wait_until_gone([pid])


def test_where_the_group_has_no_leader_the_sidecar_ends_with_who_started_it(
    engine: EngineFolder, place: SidecarPlace
) -> None:
    """As below a shell that has ended."""
    wait = """
        import os, time
        def leads():
            try:
                return os.kill(os.getpgrp(), 0) is None
            except ProcessLookupError:
                return False
        while leads():
            time.sleep(0.01)
    """
    script = textwrap.dedent(wait) + client_script(engine, place)
    start = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {script!r}]).pid)"
    read, write = os.pipe()
    with open(read, encoding="utf-8") as output:
        leader = subprocess.Popen([sys.executable, "-c", start], start_new_session=True, stdout=write)
        os.close(write)
        starter = int(output.readline())
        leader.wait()
        pid = int(output.readline())
    time.sleep(3 * WATCH_INTERVAL_S)
    assert is_running(pid)
    os.kill(starter, signal.SIGKILL)
    wait_until_gone([pid])


def test_socket_paths_always_fit(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    for folder in (Path("/tmp/e"), deep):
        place = SidecarPlace.of(folder, "fingerprint", "0")
        assert len(os.fsencode(place.socket_path)) <= MAX_SOCKET_PATH_BYTES
    assert SidecarPlace.of(Path("/tmp/e"), "f").folder == Path("/tmp/e/dspark")
    assert SidecarPlace.of(deep, "f") != SidecarPlace.of(deep / "z", "f")


def test_the_socket_is_readable_by_its_user_alone(connect, place: SidecarPlace) -> None:
    connect()
    assert place.folder.stat().st_mode & 0o077 == 0
    assert place.socket_path.stat().st_mode & 0o077 == 0
