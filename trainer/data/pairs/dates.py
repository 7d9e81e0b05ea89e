"""Dates as they are written in English, and as ISO 8601 has them."""

from datetime import date, timedelta

import pyarrow as pa

from trainer.data.read.order import mix

PAIRS = 12_000
FIRST, DAYS = date(1900, 1, 1), 73_049
"""Until the end of 2099."""
# Not those of this machine's language.
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
            "twelve": "twelfth"}  # fmt: skip


def dates() -> pa.Table:
    """Days of two centuries, each in one of eight ways."""
    days = [(mix("date", number) % DAYS, mix("way", number)) for number in range(PAIRS)]
    found = [(FIRST + timedelta(days=day), way) for day, way in days]
    return pa.table(
        {"source": [written(day, way) for day, way in found], "target": [day.isoformat() for day, _ in found]}
    )


def written(day: date, way: int) -> str:
    """A date in words."""
    month, weekday, number = MONTHS[day.month - 1], WEEKDAYS[day.weekday()], day.day
    ways = (
        f"{number} {month} {day.year}",
        f"{month} {number}, {day.year}",
        f"{weekday}, {number} {month[:3]} {day.year}",
        f"{month[:3]} {number}{_suffix(number)}, {day.year}",
        f"{weekday}, the {number}{_suffix(number)} of {month} {day.year}",
        f"the {_ordinal(number)} of {month}, {_year(day.year)}",
        f"{month} the {_ordinal(number)}, {_year(day.year)}",
        f"{weekday}, {month} {number}{_suffix(number)} {_year(day.year)}",
    )
    return ways[way % len(ways)]


def _suffix(number: int) -> str:
    return "th" if 10 < number < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _cardinal(number: int) -> str:
    """Of at most two digits."""
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def _ordinal(number: int) -> str:
    head, dash, last = _cardinal(number).rpartition("-")
    return head + dash + (ORDINALS.get(last) or (last[:-1] + "ieth" if last.endswith("y") else f"{last}th"))


def _year(year: int) -> str:
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {ONES[rest]}" if rest else "")
    if not rest:
        return f"{_cardinal(century)} hundred"
    return f"{_cardinal(century)} {'oh-' + ONES[rest] if rest < 10 else _cardinal(rest)}"
