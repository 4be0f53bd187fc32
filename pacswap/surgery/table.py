"""Text in columns, and numbers that people can read."""

from __future__ import annotations

from collections.abc import Sequence


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns under a ruled head."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "  " + "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()

    return [line(head), line(["─" * width for width in widths]), *map(line, rows)]


def quantity(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix.

    >>> quantity(4_210), quantity(26_530_000_000), quantity(1_200_000, "B"), quantity(3)
    ('4.21 k', '26.5 G', '1.2 MB', '3')
    """
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def plus(before: int, added: int) -> str:
    """What there was and what is added, with its share.

    >>> plus(33_000_000, 4_100)
    '33 M + 4.1 k (0.012 %)'
    """
    share = 100 * added / before if before else 0.0
    shown = f"{share:.0f} %" if share >= 99.5 else f"{share:.2g} %"
    shown = shown if share >= 0.01 else "under 0.01 %"
    return f"{quantity(before)} + {quantity(added)} ({shown})"
