"""Memory and CPUs within the limits of control groups, on made-up /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dspark_batch.models import kv_cache, loader
from dspark_batch.models.kv_cache import GIB, kv_pool_tokens
from dspark_batch.models.machine import available_bytes, usable_cpus
from dspark_batch.testing.tiny import save_tiny_checkpoint

NO_LIMIT_V1 = "9223372036854771712"
HOST_BYTES = 200 * GIB


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {HOST_BYTES // 1024} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def memory_v2(limit: str, usage: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon {usage - cached}\ninactive_file {cached}\nactive_file 0"
    return {"memory.max": limit, "memory.current": str(usage), "memory.stat": stat}


def memory_v1(limit: str, usage: int, cached: int = 0) -> dict[str, str]:
    stat = f"inactive_file 7\ntotal_inactive_file {cached}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": str(usage), "memory.stat": stat}


def at(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert available_bytes(write(tmp_path, {})) == HOST_BYTES
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_a_container_of_version_2_sees_its_limit_at_the_top(tmp_path: Path) -> None:
    files = at("", {**memory_v2(str(3 * GIB), 2 * GIB, cached=GIB // 2), "cpu.max": "50000 100000"})
    assert available_bytes(write(tmp_path, {"proc/self/cgroup": "0::/", **files})) == 3 * GIB // 2
    assert usable_cpus(tmp_path) == 0.5


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pods/one",
        **at("pods/one/", {**memory_v2("max", GIB), "cpu.max": "max 100000"}),
        **at("pods/", {**memory_v2(str(5 * GIB), 4 * GIB), "cpu.max": "25000 100000"}),
    }
    assert available_bytes(write(tmp_path, files)) == GIB
    assert usable_cpus(tmp_path) == 0.25


@pytest.mark.parametrize("mounted", ["", "docker/abc/"])
def test_groups_of_version_1_count_under_the_hosts_path_or_at_the_top(tmp_path: Path, mounted: str) -> None:
    cpu = {"cpu.cfs_quota_us": "30000", "cpu.cfs_period_us": "100000"}
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/",
        **at(f"memory/{mounted}", memory_v1(str(3 * GIB), GIB, cached=GIB // 4)),
        **at(f"cpu/{mounted}", cpu),
    }
    assert available_bytes(write(tmp_path, files)) == 9 * GIB // 4
    assert usable_cpus(tmp_path) == 0.3


def test_groups_of_version_1_without_limits_change_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/",
        **at("memory/", memory_v1(NO_LIMIT_V1, GIB)),
        **at("cpu/", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}),
    }
    assert available_bytes(write(tmp_path, files)) == HOST_BYTES
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_a_group_above_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = at("", memory_v2(str(GIB), 2 * GIB))
    assert available_bytes(write(tmp_path, {"proc/self/cgroup": "0::/", **files})) == 0


def test_engines_of_one_machine_together_take_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "available_bytes", lambda: 8 * GIB)

    def pool(share: float) -> int:
        device = torch.device("cpu")
        return kv_pool_tokens(
            "auto", bytes_per_token=GIB // 16, device=device, max_useful_tokens=None, machine_share=share
        )

    assert [pool(share) for share in (4.0, 1.0, 0.5, 0.25, 0.125)] == [32, 32, 32, 16, 8]


def test_an_engine_with_few_of_the_cpus_makes_a_small_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "usable_cpus", lambda: 16.0)
    monkeypatch.setattr(kv_cache, "available_bytes", lambda: 3 * 2**22)
    folder = save_tiny_checkpoint(tmp_path / "tiny")

    def pool(**settings: object) -> int:
        config = loader.EngineConfig(target=str(folder), device="cpu", dtype="float32", **settings)
        return loader.load_target(config).target.kv.num_total_tokens

    assert pool() == pool(threads=8) == 4 * pool(threads=2)
