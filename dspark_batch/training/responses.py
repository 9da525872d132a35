"""The target's own responses to the prompts, saved part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dspark_batch.core import Request, SamplingParams
from dspark_batch.training.config import ResponsesSection
from dspark_batch.training.deadline import Deadline
from dspark_batch.training.features import FeatureRecorder, write_features
from dspark_batch.training.generation import Generate, Generator
from dspark_batch.training.sequences import TokenRow, token_row, write_rows


def part_file(folder: Path, part: int) -> Path:
    """Where a part of the rows is saved."""
    return folder / f"part-{part:05d}.parquet"


def features_file(folder: Path, part: int) -> Path:
    """Where the target's features of a part are saved, if they are."""
    return folder / f"features-{part:05d}.safetensors"


def num_parts(prompts: Sequence[TokenRow], section: ResponsesSection) -> int:
    return -(-len(prompts) // section.rows_per_part)


def missing_parts(prompts: Sequence[TokenRow], section: ResponsesSection, folder: Path) -> list[int]:
    return [part for part in range(num_parts(prompts, section)) if not part_file(folder, part).is_file()]


def generate_responses(
    prompts: Sequence[TokenRow],
    section: ResponsesSection,
    generator: Generator,
    *,
    folder: Path,
    deadline: Deadline,
    on_part: Callable[[int, int, int], None] | None = None,
) -> None:
    """Write the parts that are missing, features before rows. A response depends on its prompt's id and the section
    alone.

    on_part is told (parts done, parts in all, response tokens of this part).

    Raises:
        TimeUpError: the deadline passed between two parts.
        EngineError, OSError: the engine failed, or a part cannot be written.
    """
    total = num_parts(prompts, section)
    for part in missing_parts(prompts, section, folder):
        deadline.check()
        first = part * section.rows_per_part
        chosen = prompts[first : first + section.rows_per_part]
        rows = _respond(chosen, section, generator.generate, first=first)
        if generator.recorder is not None:
            _write_features(features_file(folder, part), rows, generator.recorder)
        write_rows(part_file(folder, part), rows)
        if on_part is not None:
            done = total - len(missing_parts(prompts, section, folder))
            on_part(done, total, sum(row.num_response_tokens for row in rows))


def _write_features(file: Path, rows: Sequence[TokenRow], recorder: FeatureRecorder) -> None:
    found = {row.id: recorder.take(row.token_ids.tolist()) for row in rows}
    recorder.forget()
    write_features(file, {row_id: f for row_id, f in found.items() if f is not None}, taps=recorder.taps)


def _respond(
    prompts: Sequence[TokenRow], section: ResponsesSection, generate: Generate, *, first: int
) -> list[TokenRow]:
    by_id = {row.id: row for row in prompts}
    temperatures = {
        row.id: section.temperatures[(first + i) % len(section.temperatures)] for i, row in enumerate(prompts)
    }
    requests = [
        Request(
            id=row.id,
            prompt_token_ids=tuple(row.token_ids.tolist()),
            sampling=SamplingParams(
                max_new_tokens=section.max_new_tokens,
                temperature=temperatures[row.id],
                top_p=section.top_p,
                seed=section.seed,
                n=section.samples_per_prompt,
            ),
        )
        for row in prompts
    ]
    done = [result for result in generate(requests) if result.error is None]
    done.sort(key=lambda result: (result.id, result.sample))
    return [
        token_row(
            f"{result.id}/{result.sample}",
            by_id[result.id].token_ids.tolist(),
            result.token_ids,
            temperature=temperatures[result.id],
        )
        for result in done
    ]
