"""Sharing the nodes of a cluster out among the actors; no Ray is started."""

from __future__ import annotations

import pytest

from dspark_batch.errors import ConfigError, EngineError
from dspark_batch.job.config import RaySection
from dspark_batch.ray_data.cluster import ray_session, share_of
from dspark_batch.ray_data.environment import LOCAL_SETTINGS, cluster_address, prepare_local_environment


@pytest.mark.parametrize(
    ("nodes", "actors", "num_cpus"),
    [
        ([{"CPU": 8.0}], 1, 8.0),
        ([{"CPU": 8.0}], 3, 2.0),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 3, 4.0),
        ([{"CPU": 5.0}, {"CPU": 3.0}], 3, 2.0),
        ([{"CPU": 1.0}], 2, 0.5),
        ([{"CPU": 2.0}], 3, 0.66),
    ],
)
def test_actors_get_an_even_share_of_the_cpus_that_fits_on_the_nodes(
    nodes: list[dict[str, float]], actors: int, num_cpus: float
) -> None:
    share = share_of(nodes, section=RaySection(actors=actors), device="auto")
    assert (share.num_cpus, share.num_gpus) == (num_cpus, 0.0)
    assert share.num_threads == max(1, int(num_cpus))


def test_an_actor_takes_one_gpu_where_the_cluster_has_some_and_the_device_allows() -> None:
    nodes = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}]
    share = share_of(nodes, section=RaySection(actors=2), device="auto")
    assert (share.num_cpus, share.num_gpus) == (8.0, 1.0)
    assert share_of(nodes, section=RaySection(actors=2), device="cpu").num_gpus == 0.0


def test_explicit_shares_are_taken_as_they_are() -> None:
    section = RaySection(actors=2, num_cpus=1.5, num_gpus=0.5)
    share = share_of([{"CPU": 4.0, "GPU": 1.0}], section=section, device="auto")
    assert (share.num_cpus, share.num_gpus) == (1.5, 0.5)


@pytest.mark.parametrize(
    "section", [RaySection(actors=3, num_cpus=2), RaySection(actors=1, num_gpus=1), RaySection(actors=1, num_cpus=5)]
)
def test_actors_that_do_not_fit_are_refused_instead_of_waiting_for_ever(section: RaySection) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        share_of([{"CPU": 4.0}], section=section, device="auto")


@pytest.mark.parametrize(
    ("num_node_cpus", "actors", "num_cpus"),
    [(8.0, {"min": 1, "max": 4}, 2.0), (2.0, {"min": 1, "max": 4}, 1.0), (3.0, {"min": 3, "max": 30}, 1.0)],
)
def test_a_range_of_actors_shares_the_cpus_as_if_all_were_there_and_each_gets_one_at_least(
    num_node_cpus: float, actors: dict[str, int], num_cpus: float
) -> None:
    share = share_of([{"CPU": num_node_cpus}], section=RaySection(actors=actors), device="auto")
    assert share.num_cpus == num_cpus


def test_the_fewest_actors_of_a_range_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"3 actors with 1 CPUs .* do not fit; room for 2"):
        share_of([{"CPU": 2.0}], section=RaySection(actors={"min": 3, "max": 4}), device="auto")


def test_a_range_of_actors_on_gpus_is_refused_with_what_to_do() -> None:
    nodes = [{"CPU": 16.0, "GPU": 4.0}]
    section = RaySection(actors={"min": 1, "max": 4})
    with pytest.raises(ConfigError, match=r"ray\.actors: .*fixed size.*such as 4"):
        share_of(nodes, section=section, device="auto")
    assert share_of(nodes, section=section, device="cpu").num_gpus == 0.0


def test_the_configured_address_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cluster_address("ray://head:10001") == "ray://head:10001"
    assert cluster_address(None) == "127.0.0.1:1"
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_address(None) is None


def test_local_settings_leave_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LOCAL_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "debug")
    prepare_local_environment()
    import os

    assert os.environ["RAY_BACKEND_LOG_LEVEL"] == "debug"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine ``ray.init`` raises a plain ``Exception``."""

    def too_slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", too_slow)
    with (
        pytest.raises(EngineError, match="Ray does not start on this machine: The current node timed out"),
        ray_session(RaySection()),
    ):
        pass
