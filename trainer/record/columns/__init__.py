"""metrics.parquet: the numbers of metrics.jsonl by column, written behind a run; a million steps open at once.

A folder of Parquet files, the parts. Each has the whole lines between two bytes of metrics.jsonl, superseded ones too,
and the columns that these lines have: a metric that begins later is in later parts. Parts follow one another without a
gap; what comes after the last one is read from metrics.jsonl. A part never changes; while the last one is small, one
that has more takes its place. Beside each part stands a file of its levels: of every `levels.BUCKET` steps the least,
greatest and last value of each metric, which is all that a chart of a long run needs.

Everything here can always be made again, so nothing is lost with it: a part that is damaged, or of another
metrics.jsonl, is none.
"""

from .parts import update_columns
from .rows import read_columns, read_rows, read_some_rows

__all__ = ["read_columns", "read_rows", "read_some_rows", "update_columns"]
