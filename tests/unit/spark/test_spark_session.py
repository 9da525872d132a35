from __future__ import annotations

import warnings

import pytest

from dspark_batch.errors import ConfigError
from dspark_batch.spark.jobs import resolve_config
from dspark_batch.spark.session import SpeculationWarning, check_session, engine_spec, executor_cores


class FakeConf:
    def __init__(self, **values: str) -> None:
        self._values = {name.replace("__", "."): value for name, value in values.items()}

    def get(self, name: str, default: str | None) -> str | None:
        return self._values.get(name, default)


class FakeSession:
    def __init__(self, **values: str) -> None:
        self.conf = FakeConf(**values)


def job(**spark: object):
    return resolve_config({"prompt": {"template": "x {{ y }}"}, "spark": spark})


def test_speculation_warns_or_is_refused_as_configured() -> None:
    session = FakeSession(spark__speculation="true")
    with pytest.warns(SpeculationWarning, match="generates their rows twice"):
        check_session(session, job())
    with pytest.raises(ConfigError, match=r"spark\.on_speculation"):
        check_session(session, job(on_speculation="refuse"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_session(session, job(on_speculation="ignore"))
        check_session(FakeSession(spark__speculation="false"), job(on_speculation="refuse"))
        check_session(FakeSession(), job(on_speculation="refuse"))


@pytest.mark.parametrize(
    ("master", "configured", "expected"),
    [
        ("local", None, 1),
        ("local[4]", None, 4),
        ("local[4,2]", None, 4),
        ("local[*]", None, None),
        ("local-cluster[2, 3, 1024]", None, 3),
        ("spark://host:7077", "8", 8),
        ("spark://host:7077", None, None),
        ("local[4]", "2", 2),
        (None, None, None),
    ],
)
def test_an_executors_cores_are_read_from_the_settings(master, configured, expected) -> None:
    assert executor_cores(master=master, configured=configured) == expected


def test_the_engine_spec_names_the_factory_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_BATCH_ENGINE_FACTORY", "a.b:c")
    spec = engine_spec(FakeSession(spark__master="local[3]"), job(engine_process="sidecar"))
    assert (spec.factory, spec.executor_cores, spec.settings.engine_process) == ("a.b:c", 3, "sidecar")
