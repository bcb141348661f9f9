"""Tables: plain DataFrames of text, in which the best value of a column carries a star.

Text, because the web viewers of notebooks drop the colours of cells.
"""

import math
from collections.abc import Mapping

import pandas as pd
from pandas.io.formats.style import Styler

ARROWS = {"max": "↑", "min": "↓"}


def results_table(
    rows: Mapping[str, Mapping[str, float | int | str]],
    better: Mapping[str, str],
    *,
    digits: int | Mapping[str, int] = 3,
) -> pd.DataFrame:
    """One row a method, one column a metric; the best of each column in `better` ends in " *".

    better  {column: "max" or "min"}; the column's heading gets ↑ or ↓. Other columns mark nothing
    digits  after the decimal point, for all columns or by column (3 where not named)
    Values that print alike share the star; missing values and NaN print as "–"; text stays as it is.
    Raises ValueError where `better` names an unknown column or direction.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    for column, direction in better.items():
        if column not in columns or direction not in ARROWS:
            raise ValueError(
                f'better wants {{column: "max" or "min"}} of {columns}, got {column!r}: {direction!r}'
            )
    table = {}
    for column in columns:
        places = digits if isinstance(digits, int) else digits.get(column, 3)
        values = {name: row.get(column, math.nan) for name, row in rows.items()}
        numbers = {
            n: round(v, places) for n, v in values.items() if not isinstance(v, str) and not math.isnan(v)
        }
        best = (
            {"max": max, "min": min}[better[column]](numbers.values(), default=None)
            if column in better
            else None
        )
        heading = f"{column} {ARROWS[better[column]]}" if column in better else column
        table[heading] = {
            name: value
            if isinstance(value, str)
            else f"{numbers[name]:.{places}f}{' *' if numbers[name] == best else ''}"
            if name in numbers
            else "–"
            for name, value in values.items()
        }
    return pd.DataFrame(table, index=list(rows))


def ledger_table(rows: pd.DataFrame, *, digits: int = 3) -> Styler:
    """What `ledger.rows` gives, as text to read: claim, what the paper prints, what was found, verdict.

    "found" is the mean of the difference, ours minus the reference, with its interval, as in
    +0.012 [+0.003, +0.020]; "–" where there is none. Where a claim is about several scores, "found" is that
    of the first and "note" has them all: the verdict is on all of them. Nothing is cut off.
    """
    found = []
    for mean, low, high in zip(rows["mean"], rows["low"], rows["high"], strict=True):
        text = "–" if math.isnan(mean) else f"{mean:+.{digits}f}"
        found.append(text if math.isnan(low) else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]")
    texts = ["the paper claims", "it prints", "measured here", "verdict", "note"]
    table = pd.DataFrame({name: rows[name].replace("", "–") for name in texts})
    table.insert(3, "found", found)
    return table.style.set_properties(None, **{"text-align": "left", "white-space": "normal"})


def in_millions(count: int) -> str:
    """A number of parameters as text: 29_450_000 is "29.45 M"."""
    return f"{count / 1e6:.2f} M"


def in_billions(count: int) -> str:
    """A number of multiply-adds as text: 310_000_000 is "0.31 G"."""
    return f"{count / 1e9:.2f} G"
