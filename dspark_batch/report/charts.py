"""Where the lines, bars and ticks of a chart go. The page's template draws them, so that all text is escaped there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

WIDTH, HEIGHT = 760, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 16, 32
"""Margins around the plot, in units of the drawing."""
CUT_LABEL_WIDTH = 125
TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line of steps, and the area below it, as SVG paths. It breaks where there is no value."""

    name: str
    path: str
    area: str


@dataclass(frozen=True, slots=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    label: str
    value: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``cuts``: where a pause was cut out of the time axis; the label is when the run went on."""

    title: str
    about: str
    x_name: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    cuts: Sequence[Tick] = ()

    width = WIDTH
    height = HEIGHT
    left = LEFT
    right = WIDTH - RIGHT
    top = TOP
    bottom = HEIGHT - BOTTOM


def time_chart(
    title: str,
    lines: Mapping[str, Sequence[float | None]],
    *,
    about: str,
    total_s: float,
    cuts: Sequence[tuple[float, str]] = (),
) -> Chart:
    """``lines``: by name, a value for each of a number of equal parts of ``total_s``."""
    values = [value for line in lines.values() for value in line if value is not None]
    y_ticks, highest = _value_ticks(max(values, default=0.0))
    return Chart(
        title=title,
        about=about,
        x_name="time in which an engine ran",
        x_ticks=[Tick(_x(at_s / total_s), format_time(at_s)) for at_s in _times(total_s)],
        y_ticks=y_ticks,
        lines=[_line(name, line, highest=highest) for name, line in lines.items()],
        cuts=_cuts([Tick(_x(at_s / total_s), label) for at_s, label in cuts]),
    )


def position_chart(title: str, counts: Sequence[tuple[int, int]], *, about: str) -> Chart:
    """A bar for each draft position: the accepted share of its verified tokens. ``counts``: (verified, accepted)."""
    slot = 1 / max(len(counts), 8)
    bars = []
    for place, (verified, accepted) in enumerate(counts):
        share = accepted / verified if verified else 0.0
        left, right = _x((place + 0.15) * slot), _x((place + 0.85) * slot)
        bars.append(
            Bar(
                x=left,
                y=_y(share),
                width=round(right - left, 2),
                height=round(_y(0.0) - _y(share), 2),
                label=str(place + 1),
                value=f"{100 * share:.0f}" if verified else "",
                title=f"position {place + 1}: {accepted:,} of {verified:,} verified tokens accepted",
            )
        )
    return Chart(
        title=title,
        about=about,
        x_name="draft position",
        x_ticks=[],
        y_ticks=[Tick(_y(percent / 100), f"{percent} %") for percent in (0, 25, 50, 75, 100)],
        bars=bars,
    )


def format_time(seconds: float) -> str:
    """``0``, ``30s``, ``5m``, ``1h``, ``1h 30m``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    parts = [f"{count}{unit}" for count, unit in ((hours, "h"), (minutes, "m"), (left, "s")) if count]
    return " ".join(parts) or "0"


def _line(name: str, values: Sequence[float | None], *, highest: float) -> Line:
    floor = _y(0.0)
    path = area = ""
    for has_value, group in groupby(enumerate(values), key=lambda pair: pair[1] is not None):
        if not has_value:
            continue
        places = [(place, _y((value or 0.0) / highest)) for place, value in group]
        begin = _x(places[0][0] / len(values))
        steps = "".join(f"V{height}H{_x((place + 1) / len(values))}" for place, height in places)
        path += f"M{begin} {places[0][1]}{steps}"
        area += f"M{begin} {floor}{steps}V{floor}H{begin}Z"
    return Line(name, path, area)


def _cuts(cuts: Sequence[Tick]) -> list[Tick]:
    """All cuts, and as many of their labels as have room."""
    shown: list[Tick] = []
    free_from = 0.0
    for cut in cuts:
        has_room = cut.at >= free_from
        shown.append(cut if has_room else Tick(cut.at, ""))
        free_from = cut.at + CUT_LABEL_WIDTH if has_room else free_from
    return shown


def _value_ticks(highest: float) -> tuple[list[Tick], float]:
    """Ticks at round values from 0 to the first above ``highest``; and that."""
    if highest <= 0:
        return [Tick(_y(0.0), "0")], 1.0
    rough = highest / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    num_steps = math.ceil(highest / step)
    top = num_steps * step
    return [Tick(_y(n * step / top), f"{n * step:,.10g}") for n in range(num_steps + 1)], top


def _times(total_s: float) -> list[float]:
    step = next((step for step in TIME_STEPS_S if total_s / step <= 8), None)
    if step is None:
        step = math.ceil(total_s / 8 / TIME_STEPS_S[-1]) * TIME_STEPS_S[-1]
    return [float(n * step) for n in range(int(total_s / step) + 1)]


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - RIGHT - LEFT), 2)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 2)
