"""Process settings that must stand before Ray is imported. Imports no Ray itself."""

from __future__ import annotations

import os

LOCAL_SETTINGS = {
    # Despite its name this decides on every system whether Ray's processes listen on the loopback address only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Ray lets its workers give way to every other process, its own included; here they are what the machine is for.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

DRIVER_SETTINGS = {
    # A thread that outlives the run must not make Ray join or start another cluster.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


def cluster_address(configured: str | None) -> str | None:
    """The cluster to join: the configured one, else ``RAY_ADDRESS`` (set inside ``ray job submit``), else None."""
    return configured or os.environ.get("RAY_ADDRESS") or None


def prepare_local_environment() -> None:
    """Settings of a Ray that this process starts: loopback only, no telemetry, quiet. Variables already set stay."""
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)


def prepare_driver_environment(address: str | None) -> None:
    """Settings of a driver that joins ``address``, or starts a Ray of its own. Variables already set stay."""
    for name, value in DRIVER_SETTINGS.items():
        os.environ.setdefault(name, value)
    if address is None:
        prepare_local_environment()
