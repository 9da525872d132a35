from __future__ import annotations

import torch

from dspark_batch.sampling.streams import Stream, stream_uniforms

KEYS = torch.tensor([3, -(2**62), 2**63 - 1])


def test_a_number_is_a_function_of_stream_key_round_and_slot_only() -> None:
    rounds = torch.tensor([0, 7, 2**40])
    wide = stream_uniforms(Stream.ACCEPT, keys=KEYS, rounds=rounds, num_slots=11)
    for row in range(3):
        alone = stream_uniforms(Stream.ACCEPT, keys=KEYS[row : row + 1], rounds=rounds[row : row + 1], num_slots=4)
        assert torch.equal(alone[0], wide[row, :4])
    assert ((wide > 0) & (wide < 1)).all()


def test_streams_rounds_and_rows_are_uncorrelated_and_uniform() -> None:
    keys = torch.arange(20_000)
    zero = torch.zeros_like(keys)
    columns = [
        stream_uniforms(stream, keys=keys, rounds=zero + number, num_slots=2) for stream in Stream for number in (0, 1)
    ]
    draws = torch.cat(columns, dim=1).T
    correlation = torch.corrcoef(draws) - torch.eye(len(draws), dtype=torch.float64)
    assert correlation.abs().max() < 5 / 20_000**0.5
    counts = torch.histc(draws[0].float(), bins=16, min=0, max=1)
    assert ((counts - 1250) ** 2 / 1250).sum() < 15 + 5 * 30**0.5
