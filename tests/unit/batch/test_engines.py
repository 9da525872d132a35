"""What a user reads when an engine cannot be made."""

from __future__ import annotations

import pytest

from dspark_batch.batch.engines import make_engine
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, ModelError
from dspark_batch.testing.scripted_engine import ScriptedEngine

HERE = __name__


def greedy_for_memory(config: EngineConfig) -> ScriptedEngine:
    raise MemoryError("Unable to allocate 16.0 GiB")


def out_of_device_memory(config: EngineConfig) -> ScriptedEngine:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def with_a_bug(config: EngineConfig) -> ScriptedEngine:
    raise KeyError("lm_head.weight")


def refused(config: EngineConfig) -> ScriptedEngine:
    raise ModelError("no such checkpoint")


@pytest.mark.parametrize("name", ["greedy_for_memory", "out_of_device_memory"])
def test_lack_of_memory_is_a_model_error_that_says_what_to_lower(name: str) -> None:
    with pytest.raises(ModelError, match=r"model 'tiny' cannot be loaded: \w+: .*allocate") as caught:
        make_engine(EngineConfig(target="tiny"), factory=f"{HERE}:{name}")
    assert "engine.kv_cache_gib" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_other_fault_is_a_model_error_with_its_kind() -> None:
    with pytest.raises(ModelError, match=r"model 'tiny' cannot be loaded: KeyError: 'lm_head.weight'$"):
        make_engine(EngineConfig(target="tiny"), factory=f"{HERE}:with_a_bug")


def test_an_error_in_words_of_our_own_stays_as_it_is() -> None:
    with pytest.raises(ModelError, match=r"^no such checkpoint$"):
        make_engine(EngineConfig(), factory=f"{HERE}:refused")


@pytest.mark.parametrize("factory", ["nowhere:engine", "dspark_batch.core:engine", "nonsense"])
def test_a_factory_that_is_not_there_is_a_config_error(factory: str) -> None:
    with pytest.raises(ConfigError, match="no importable module:function"):
        make_engine(EngineConfig(), factory=factory)
