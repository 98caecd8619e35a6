"""One metric of one run over its steps, thinned where a page could not hold all of it."""

import dataclasses
from collections.abc import Sequence

from beit_jax.types import JsonObject

MOST = 2000  # points of a curve: a screen has about as many columns
_LARGEST = 1e300  # what is larger overflows in a browser's arithmetic, and is as good as infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A metric's values.

    Attributes:
      steps: at which it was logged, ascending.
      values: as many; None where the value was not finite, or as good as infinite.
    """

    steps: tuple[int, ...]
    values: tuple[float | None, ...]

    @property
    def finite(self) -> list[tuple[int, float]]:
        """The steps and values of those that are numbers."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if value is not None]


def of(lines: Sequence[JsonObject], metric: str) -> Series:
    """The series of a metric, of the lines of a `metrics.jsonl`; empty where no line has it."""
    found = [line for line in lines if metric in line]
    return Series(
        steps=tuple(int(line["step"]) for line in found),
        values=tuple(_finite(line[metric]) for line in found),
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or abs(value) > _LARGEST else float(value)


def thinned(series: Series, *, most: int = MOST) -> Series:
    """At most `most` points or so: of each stretch the lowest and the highest, and where it breaks.

    The first and the last point stay. A stretch with a value that is not finite keeps one such.

    Args:
      series: of any length.
      most: points from which on it is thinned, at least 4.
    """
    count = len(series.steps)
    if count <= most:
        return series
    kept = {0, count - 1}
    stretches = most // 3
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        numbers = [at for at in stretch if series.values[at] is not None]
        if numbers:
            kept.add(min(numbers, key=lambda at: series.values[at] or 0.0))
            kept.add(max(numbers, key=lambda at: series.values[at] or 0.0))
        if len(numbers) < len(stretch):
            kept.add(next(at for at in stretch if series.values[at] is None))
    chosen = sorted(kept)
    return Series(
        steps=tuple(series.steps[at] for at in chosen),
        values=tuple(series.values[at] for at in chosen),
    )
