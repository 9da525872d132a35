from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dspark_batch.core import Request, Result, SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.draft_model import DraftModelDrafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.engine.config import EngineConfig, VerificationMode
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.errors import UnsupportedModelError
from dspark_batch.sampling.sampler import PositionBatch, SampledRow
from dspark_batch.tensors import Verdict
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget
from dspark_batch.testing.tiny import save_tiny_checkpoint
from dspark_batch.verification.base import TargetDraws, VerifyRow
from dspark_batch.verification.token import TokenVerifier

VOCAB = 32
NO_STOP = frozenset[int]()
SAMPLINGS = (
    SamplingParams(max_new_tokens=23),
    SamplingParams(max_new_tokens=17, temperature=1.0, seed=3),
    SamplingParams(max_new_tokens=11, temperature=0.7, top_p=0.9, seed=1),
    SamplingParams(max_new_tokens=29, temperature=1.2, top_k=5, repetition_penalty=1.3, seed=2),
)


def toy(contrast: float = 4.0, *, num_kv_tokens: int = 4096) -> ScriptedTarget:
    return ScriptedTarget(vocab_size=VOCAB, max_context=96, num_kv_tokens=num_kv_tokens, contrast=contrast)


def requests(count: int = 9) -> list[Request]:
    rng = random.Random(6)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range((7 * i) % 31 + 1)) for i in range(count)]
    return [Request(id=f"r{i}", prompt_token_ids=p, sampling=SAMPLINGS[i % 4]) for i, p in enumerate(prompts)]


def run(drafter: DraftModelDrafter | NoDrafter, mode: VerificationMode = "coupled") -> dict[str, Result]:
    model = ScriptedModel(target=toy(), codec=LetterCodec(), eos_token_ids=frozenset({5}))
    config = EngineConfig(
        verification=mode, schedule="fixed", max_concurrency=5, max_step_tokens=64, poison_dead_kv=True, threads=1
    )
    with BatchEngine(model, config, drafter=drafter) as engine:
        for request in requests():
            engine.add(request)
        results: dict[str, Result] = {}
        while engine.num_unfinished:
            results.update((result.id, result) for _, result in engine.step())
            engine.check_integrity()
    return results


def rate(results: dict[str, Result]) -> float:
    return sum(r.num_accepted_tokens for r in results.values()) / sum(r.num_drafted_tokens for r in results.values())


@pytest.mark.parametrize(
    ("contrast", "gamma", "max_step_tokens"), [(4.0, 1, 2048), (4.0, 7, 5), (1.0, 3, 2048), (1.0, 7, 37)]
)
def test_coupled_outputs_are_those_of_plain_decoding(contrast: float, gamma: int, max_step_tokens: int) -> None:
    # The scripted model raises when it reads KV of a rolled-back token: dead KV is poisoned after every draft.
    draft = toy(contrast)
    drafter = DraftModelDrafter(draft, max_draft_tokens=gamma, max_step_tokens=max_step_tokens, poison_dead_kv=True)
    plain, drafted = run(NoDrafter()), run(drafter)
    assert {i: r.token_ids for i, r in drafted.items()} == {i: r.token_ids for i, r in plain.items()}
    assert draft.kv.num_used_tokens == 0


def test_the_target_itself_is_accepted_whole_in_coupled_mode() -> None:
    results = run(DraftModelDrafter(toy(), max_draft_tokens=6))
    # A stop token inside a block leaves drafted tokens behind it, so whole rows are counted by rounds.
    for result in results.values():
        if result.finish_reason == "length":
            assert result.num_accepted_tokens == result.num_drafted_tokens


@pytest.mark.parametrize("mode", ["token", "block"])
def test_the_target_itself_is_accepted_nearly_whole_in_rejection_modes(mode: VerificationMode) -> None:
    results = run(DraftModelDrafter(toy(), coupled=False, max_draft_tokens=6), mode)
    assert all(r.num_accepted_tokens == r.num_drafted_tokens for r in results.values() if r.finish_reason == "length")
    other = run(DraftModelDrafter(toy(2.0), coupled=False, max_draft_tokens=6), mode)
    assert rate(other) < rate(results)


def test_shared_noise_is_accepted_more_often_than_noise_of_its_own() -> None:
    shared = rate(run(DraftModelDrafter(toy(3.0), max_draft_tokens=4)))
    own = rate(run(DraftModelDrafter(toy(3.0), coupled=False, max_draft_tokens=4)))
    assert shared > own + 0.1


@pytest.mark.parametrize("mode", ["token", "block"])
def test_rejection_modes_sample_the_targets_law_through_the_engine(mode: VerificationMode) -> None:
    vocab, length, count = 3, 4, 2000
    target = ScriptedTarget(vocab_size=vocab, max_context=16, num_kv_tokens=2**15, contrast=1.5)
    draft = ScriptedTarget(vocab_size=vocab, max_context=16, num_kv_tokens=2**15, contrast=0.8)
    config = EngineConfig(
        verification=mode, schedule="fixed", max_concurrency=1000, max_step_tokens=8192, share_prefixes=False
    )
    model = ScriptedModel(target=target, codec=None, eos_token_ids=NO_STOP)
    drafter = DraftModelDrafter(draft, coupled=False, max_draft_tokens=3, max_step_tokens=8192)
    sampling = SamplingParams(max_new_tokens=length, temperature=1.0)
    observed: dict[tuple[int, ...], int] = {}
    with BatchEngine(model, config, drafter=drafter) as engine:
        for i in range(count):
            engine.add(Request(id=str(i), prompt_token_ids=(1, 2), sampling=sampling))
        while engine.num_unfinished:
            for _, result in engine.step():
                observed[result.token_ids] = observed.get(result.token_ids, 0) + 1
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*x, v): w * float(p)
            for x, w in law.items()
            for v, p in enumerate(target.expected_logits([1, 2, *x]).double().softmax(-1))
        }
    cells = [(observed.get(x, 0), w * count) for x, w in law.items() if w * count >= 5]
    rest = count - sum(o for o, _ in cells), count - sum(e for _, e in cells)
    cells.append(rest)
    chi_square = sum((o - e) ** 2 / e for o, e in cells if e > 0)
    assert chi_square < len(cells) + 5 * (2 * len(cells)) ** 0.5


def test_no_two_draws_of_a_row_share_a_round_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, int]] = set()
    verify = TokenVerifier.verify

    def recorded(self: TokenVerifier, rows: Sequence[VerifyRow], target: TargetDraws) -> Verdict:
        keys = {(row.noise_key, row.round_index) for row in rows}
        assert len(keys) == len(rows)
        assert not keys & seen, "the prefill's token and the first round count as two"
        seen.update(keys)
        return verify(self, rows, target)

    monkeypatch.setattr(TokenVerifier, "verify", recorded)
    run(DraftModelDrafter(toy(2.0), coupled=False, max_draft_tokens=2), "token")
    assert len(seen) > 30


def test_probabilities_are_those_that_the_tokens_were_drawn_from() -> None:
    model = toy(2.0)
    drafter = DraftModelDrafter(model, coupled=False, max_draft_tokens=4)
    rows = [DraftRow(i, 99 + i, s, [3, 1, 4, 1, 5][: i + 1], 1) for i, s in enumerate(SAMPLINGS)]
    for row in rows:
        drafter.add(row)
    block = drafter.propose(rows, [4, 3, 0, 2])
    assert block.probs is not None
    assert [len(ids) for ids in block.token_ids] == [4, 3, 0, 2]
    assert block.probs[0] is None, "a greedy draft is one-hot"
    assert block.probs[2] is None
    for r in (1, 3):
        probs, row = block.probs[r], rows[r]
        assert probs is not None
        for k, token in enumerate(block.token_ids[r]):
            text = [*row.token_ids, *block.token_ids[r][:k]]
            seen = torch.tensor(text).numpy() if row.sampling.repetition_penalty != 1 else None
            logits = model.expected_logits(text).unsqueeze(0)
            expected = PositionBatch(logits.float().clone(), [SampledRow(row.sampling, 0, 0, (), seen)]).probs()
            torch.testing.assert_close(probs[k], expected[0], rtol=1e-5, atol=1e-6)
            assert probs[k, token] > 0


def test_drafts_of_two_rounds_over_the_same_text_use_different_noise_except_in_coupled_mode() -> None:
    row = DraftRow(0, 7, SamplingParams(temperature=5.0), [1, 2, 3], 3)
    drafts = {}
    for coupled in (True, False):
        drafter = DraftModelDrafter(toy(0.1), coupled=coupled, max_draft_tokens=8)
        drafter.add(row)
        drafts[coupled] = [list(drafter.propose([row], [8]).token_ids[0]) for _ in range(2)]
    assert drafts[True][0] == drafts[True][1]
    assert drafts[False][0] != drafts[False][1]


def test_rows_without_room_in_the_cache_are_not_drafted_for_and_never_block() -> None:
    drafter = DraftModelDrafter(toy(num_kv_tokens=30), max_draft_tokens=4)
    rows = [DraftRow(i, i, SamplingParams(max_new_tokens=16), [1, 2, 3, 4], 3) for i in range(2)]
    for row in rows:
        drafter.add(row)
    assert [len(ids) for ids in drafter.propose(rows, [4, 4]).token_ids] == [4, 0]
    drafter.remove(rows[0], finished=True)
    assert [len(ids) for ids in drafter.propose(rows[1:], [4]).token_ids] == [4]
    drafter.check_integrity()


def test_a_context_longer_than_the_draft_models_is_not_drafted_for() -> None:
    drafter = DraftModelDrafter(toy(), max_draft_tokens=8)
    row = DraftRow(0, 0, SamplingParams(max_new_tokens=50), list(range(30)) * 3, 85)
    drafter.add(row)
    assert len(drafter.propose([row], [8]).token_ids[0]) == 6
    row.token_ids.extend([1] * 6)  # type: ignore[attr-defined]
    assert drafter.propose([row], [8]).token_ids == [[]]


def test_a_checkpoint_drafts_for_its_own_target_and_changes_nothing(tmp_path: Path) -> None:
    target = save_tiny_checkpoint(tmp_path / "target", "qwen3", seed=1)
    common = {"target": str(target), "dtype": "float32", "device": "cpu", "kv_cache_gib": 0.01, "max_concurrency": 4}
    prompts = [tuple(range(5 + 3 * i, 12 + 7 * i)) for i in range(6)]
    jobs = [
        Request(id=str(i), prompt_token_ids=p, sampling=SamplingParams(max_new_tokens=19, temperature=i % 2 * 0.8))
        for i, p in enumerate(prompts)
    ]
    outputs = []
    for extra in ({"drafter": "none"}, {"drafter": "draft_model", "drafter_path": str(target), "schedule": "fixed"}):
        with BatchEngine.from_config(EngineConfig.model_validate({**common, **extra})) as engine:
            outputs.append({r.id: r for r in engine.generate(jobs)})
    assert {i: r.token_ids for i, r in outputs[0].items()} == {i: r.token_ids for i, r in outputs[1].items()}
    assert rate(outputs[1]) > 0.9


def test_another_vocabulary_or_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    target = save_tiny_checkpoint(tmp_path / "target", "llama")
    wider = save_tiny_checkpoint(tmp_path / "wider", "llama", vocab_size=280, tokenizer=False)
    other = save_tiny_checkpoint(tmp_path / "other", "llama")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"!"', '"\\u00a7\\u00a7"'))

    def build(drafter_path: Path) -> BatchEngine:
        return BatchEngine.from_config(
            EngineConfig(
                target=str(target),
                drafter="draft_model",
                drafter_path=str(drafter_path),
                schedule="fixed",
                dtype="float32",
                device="cpu",
                kv_cache_gib=0.01,
            )
        )

    with pytest.raises(UnsupportedModelError, match=r"vocabulary of 280 tokens, target .* has 272"):
        build(wider)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer of .*other"):
        build(other)
