"""Counts and quantities as messages say them."""


def counted(number: float, what: str, verbs: str = "") -> str:
    """`1 file`, `2 files`, `1,000 processes`, `0.5 CPUs`; with `verbs` such as "is/are" `1 file is`, `2 files are`."""
    many = "es" if what.endswith(("s", "x", "ch")) else "s"
    said = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    one, _, more = verbs.partition("/")
    return f"{said} {what} {one}".rstrip() if number == 1 else f"{said} {what}{many} {more}".rstrip()


def scientific(value: float) -> str:
    """`1e13`, `2.52e21`: at most three digits, fit for a name."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
