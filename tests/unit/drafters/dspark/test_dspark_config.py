import json
from pathlib import Path
from typing import Any

import pytest

from dspark_batch.drafters.dspark.config import deepspec_fields, dspark_config
from dspark_batch.errors import ModelError, UnsupportedModelError
from dspark_batch.testing.tiny_drafter import random_drafter, save_speculators_drafter, tiny_drafter_config


def deepspec(**overrides: Any) -> dict[str, Any]:
    fields = deepspec_fields(tiny_drafter_config()) | overrides
    return {name: value for name, value in fields.items() if value is not ...}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"markov": "gated"},
        {"markov": None, "has_confidence": False, "sample_from_anchor": False},
        {"draft_vocab_size": 23, "markov": "rnn"},
        {"windows": (None, 9), "causal_windows": True},
        {"windows": (9, 9)},
        {"target_fingerprint": "abc", "num_target_layers": 4},
        {"confidence_temperatures": (1.0, 0.5, 2.0, 1.0, 1.0), "expected_survival": (0.9, 0.5, 0.5, 0.2, 0.1)},
    ],
)
def test_both_layouts_give_the_config_that_was_written(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = tiny_drafter_config(**overrides)
    assert dspark_config(deepspec_fields(config), where="here") == tiny_drafter_config(
        **{"causal_windows": not config.windows or config.causal_windows, **overrides}
    )
    save_speculators_drafter(tmp_path, random_drafter(config))
    nested = dspark_config(json.loads((tmp_path / "config.json").read_text()), where="here")
    only_ours = {"target_fingerprint": None, "num_target_layers": None}
    only_ours |= {"confidence_temperatures": (), "expected_survival": ()}
    assert nested == tiny_drafter_config(**{**overrides, **only_ours})


def test_layer_numbers_of_the_speculators_layout_are_one_higher(tmp_path: Path) -> None:
    save_speculators_drafter(tmp_path, random_drafter(tiny_drafter_config()), aux_hidden_state_layer_ids=[0, 2, 4])
    config = dspark_config(json.loads((tmp_path / "config.json").read_text()), where="here")
    assert config.taps == (-1, 1, 3)


@pytest.mark.parametrize(("from_anchor", "num_drafted"), [(True, 5), (False, 4)])
def test_the_anchors_slot_drafts_only_where_the_checkpoint_samples_from_it(from_anchor: bool, num_drafted: int) -> None:
    config = dspark_config(deepspec(sample_from_anchor=from_anchor), where="here")
    assert (config.num_draft_tokens, config.first_slot) == (num_drafted, 5 - num_drafted)


def test_a_dflash_file_without_heads_drafts_one_token_less_than_its_block() -> None:
    fields = deepspec(
        architectures=["DFlashDraftModel"],
        dflash_config={"mask_token_id": 9, "target_layer_ids": [0, 2]},
        **dict.fromkeys(
            ("mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head", "sample_from_anchor"), ...
        ),
    )
    config = dspark_config(fields, where="here")
    assert (config.markov, config.has_confidence, config.num_draft_tokens) == (None, False, 4)
    assert (config.mask_token_id, config.taps) == (9, (0, 2))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "gemma"}, "gemma"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"dflash_config": {"projector_type": "dspark"}}, "projector_type"),
        ({"speculators_model_type": "eagle3"}, "eagle3"),
    ],
)
def test_what_the_drafter_does_not_compute_is_refused_by_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        dspark_config(deepspec(**overrides), where="here")


def test_every_senseless_field_is_named_at_once() -> None:
    fields = deepspec(
        hidden_size=...,
        block_size=0,
        num_attention_heads="six",
        mask_token_id=61,
        target_layer_ids=[3, 1],
        markov_head_type="lstm",
        layer_types=["full_attention"],
        enable_confidence_head="yes",
    )
    with pytest.raises(ModelError) as caught:
        dspark_config(fields, where="some/config.json")
    message = str(caught.value)
    assert "some/config.json" in message
    for part in ("hidden_size", "block_size", "'six'", "mask_token_id 61", "[3, 1]", "'lstm'", "layer_types", "'yes'"):
        assert part in message


@pytest.mark.parametrize(
    ("survival", "named"),
    [([0.5, 0.4], "expected_survival of 2 for 5"), ([0.5, 0.6, 0.1, 0.1, 0.1], "that rises"), ([1.5], "at most 1")],
)
def test_senseless_expectations_are_refused(survival: list[float], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        dspark_config(deepspec(expected_survival=survival), where="here")
