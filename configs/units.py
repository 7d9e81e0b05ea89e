"""Formatting of numbers with their units, for messages and tables."""

import re
import time

COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}
SIZES = ((" EB", 1e18), (" PB", 1e15), (" TB", 1e12), (" GB", 1e9), (" MB", 1e6), (" kB", 1e3), (" B", 1.0))


def counted(number: float, what: str, verbs: str = "") -> str:
    """`1 file`, `2 files`, `1,000 processes`, `0.5 CPUs`; with `verbs`, such as "is/are" `1 file is`, `2 files are`."""
    many = "es" if what.endswith(("s", "x", "ch")) else "s"
    said = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    one, _, more = verbs.partition("/")
    return f"{said} {what} {one}".rstrip() if number == 1 else f"{said} {what}{many} {more}".rstrip()


def scientific(value: float) -> str:
    """`1e13`, `2.52e21`: at most three digits, for use in names."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def short(count: float) -> str:
    """`1.24M`, `350B`: three significant digits, for use in names."""
    return _scaled(count, COUNTS)


def byte_size(count: float) -> str:
    """Bytes: `512 B`, `4.9 kB`, `80 GB`; a kB is 1,000 bytes."""
    return _scaled(count, SIZES)


def duration(seconds: float) -> str:
    """`12.3 ms`, `4.56 s`, `2 min 3 s`, `1 h 2 min`, `2.3 days`."""
    if 0 < seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    if seconds < 3599.5:
        return _two(round(seconds), "min", "s")
    return _two(round(seconds / 60), "h", "min") if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def seconds_in(text: str) -> float | None:
    """Parse what `duration` wrote, to the digits shown; None if there is no duration."""
    parts = re.findall(r"\b(\d[\d,]{0,15}(?:\.\d{1,9})?) (ms|s|min|h|days)\b", text)
    return sum(float(number.replace(",", "")) * SECONDS[unit] for number, unit in parts) if parts else None


def ago(then: float | None) -> str:
    """How long since `then`, in seconds since 1970: `3 min ago`; nothing for None."""
    if then is None:
        return ""
    seconds = max(0.0, time.time() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    for unit, one in units:
        if value >= one * 0.9995:  # where rounding to three digits reaches the next unit
            return f"{value / one:.3g}{unit}"
    return f"{value:.3g}{units[-1][0]}"


def _two(count: int, larger: str, smaller: str) -> str:
    whole, rest = divmod(count, 60)
    return f"{whole} {larger} {rest} {smaller}" if rest else f"{whole} {larger}"
