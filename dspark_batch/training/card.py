"""The card of a trained drafter: what it was made from and how it does, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dspark_batch.provenance import atomic_write_text
from dspark_batch.training.calibrate import CalibrationReport
from dspark_batch.training.curve import CurvePoint
from dspark_batch.training.evaluate import Acceptance

CARD_FILE, CARD_PAGE = "card.json", "CARD.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """num_draft_vocab_hits: response tokens that can be drafted, as a share of all."""

    num_rows: int
    num_prompt_tokens: int
    num_response_tokens: int
    num_blocks_per_epoch: int
    draft_vocab_coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Everything that is known about a trained drafter. config: the training config, every default written out."""

    target: str
    target_fingerprint: str
    config: Mapping[str, object]
    data: DataFacts
    num_parameters: int
    num_steps: int
    num_positions: int
    elapsed_s: float
    positions_per_s: float
    flops_per_position: float
    flops_per_s: float
    device: str
    versions: Mapping[str, str]
    last_point: CurvePoint | None
    acceptance: tuple[Acceptance, ...]
    calibration: CalibrationReport | None


def write_card(folder: Path, card: Card) -> None:
    """``card.json`` and ``CARD.md`` beside the checkpoint. Raises OSError."""
    atomic_write_text(folder / CARD_FILE, json.dumps(asdict(card), indent=2, sort_keys=True) + "\n")
    atomic_write_text(folder / CARD_PAGE, card_page(card))


def card_page(card: Card) -> str:
    """The card as Markdown."""
    data, lines = card.data, []
    lines += [f"# Drafter for {card.target}", "", f"Target fingerprint `{card.target_fingerprint}`.", ""]
    lines += [
        f"- {card.num_parameters / 1e6:.1f}M trained weights, {card.num_steps} steps, {card.num_positions:,} positions",
        f"- {data.num_rows:,} rows, {data.num_response_tokens:,} response tokens; the draft vocabulary covers "
        f"{100 * data.draft_vocab_coverage:.1f} % of them",
        f"- trained in {card.elapsed_s / 60:.1f} min on {card.device}: {card.positions_per_s:,.0f} positions/s, "
        f"{card.flops_per_position / 1e6:.0f} MFLOP each (target included), {card.flops_per_s / 1e9:,.0f} GFLOP/s",
        "",
    ]
    if card.acceptance:
        lines += ["## Accepted length (bonus included, full blocks)", "", "| prompts | T | length | by position |"]
        lines += ["|---|---|---|---|", *(_acceptance_line(a) for a in card.acceptance), ""]
    if card.calibration is not None:
        lines += ["## Calibration (STS), on rounds that the fit did not see", ""]
        lines += ["| slot | temperature | ECE before | ECE after | AUC |", "|---|---|---|---|---|"]
        lines += [*_calibration_lines(card.calibration), ""]
    lines += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in sorted(card.versions.items())), ""]
    return "\n".join(lines)


def throughput(points: Sequence[CurvePoint]) -> tuple[int, float, float]:
    """(positions, positions per second, floating-point operations per position) over a whole curve."""
    positions = sum(point.num_positions for point in points)
    if not points or not positions:
        return 0, 0.0, 0.0
    return positions, positions / max(points[-1].elapsed_s, 1e-9), sum(point.flops for point in points) / positions


def _acceptance_line(a: Acceptance) -> str:
    by_position = " ".join(f"{share:.2f}" for share in a.by_position)
    return f"| {a.name} ({a.num_prompts}) | {a.temperature:g} | {a.accepted_length:.2f} | {by_position} |"


def _calibration_lines(report: CalibrationReport) -> list[str]:
    columns = zip(report.temperatures, report.ece_before, report.ece_after, report.auc_after, strict=True)
    return [
        f"| {k + 1} | {t:.2f} | {before:.3f} | {after:.3f} | {'-' if area is None else f'{area:.2f}'} |"
        for k, (t, before, after, area) in enumerate(columns)
    ]
