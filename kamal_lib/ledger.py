"""The claims ledger: what a paper claims and prints, beside what was measured here.

A paper's claims and tables are facts about it, told in our own words, in `papers/<paper>.json`. A study adds
an entry for each claim that it measured, with the rule by which it is judged, written down before the run.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

PAPERS = Path(__file__).parent / "papers"
VERDICTS = ("holds", "open", "opposite seen")
Verdict = Literal["holds", "open", "opposite seen"]
COLUMNS = (
    *("claim", "where", "the paper claims", "it prints", "its tables", "measured here"),
    *("mean", "low", "high", "verdict", "rule", "note"),
)


@dataclass(frozen=True)
class Claim:
    """What a paper says somewhere.

    numbers     what it prints for it, None where it prints nothing; of a pair the first is the reference
    tables_say  how its own tables stand to it: "agrees", "partly", "contradicts", "not printed", or
                "unreadable" where we could not read the table
    remark      why, where that is not plain; may be empty
    """

    id: str
    where: str
    claim: str
    numbers: Mapping[str, Any] | None
    tables_say: str
    remark: str


def claims(paper: str = "ye2019") -> dict[str, Claim]:
    """{id: claim} of one paper, in its order. Raises ValueError for a paper that is not here."""
    return {each["id"]: Claim(**each) for each in _read(paper)["claims"]}


def table(paper: str, name: str) -> dict[str, Any]:
    """A printed table: caption, data, columns, better ("min" or "max" by column), units, rows, notes.

    A row has its `method`, no two alike, and a number or None (a dash) for each column. By column it may have
    `qualifiers`, the ~ or > in front of a number, and `spread`, the ± behind one, which then is a mean.
    `labels`, where a table has them, name what else stands in each row without being measured. A figure is
    here where the text gives numbers of it. No rows: we could not read them, and a note says so.
    Raises ValueError for a paper or a table that is not here.
    """
    tables = _read(paper)["tables"]
    if name not in tables:
        raise ValueError(f"{paper} has no {name!r}, its tables are: {', '.join(tables)}")
    return tables[name]


def verdict(low: float, high: float, better: str) -> Verdict:
    """Of the interval of a paired difference, ours minus the reference, where `better` is "min" or "max".

    "holds" where the whole interval lies on the better side of 0, "opposite seen" where it lies on the other
    side, "open" where it reaches across 0 or touches it. Raises ValueError for bounds that are not finite or
    in the wrong order, and for another `better`.
    """
    low, high = _bounds(low, high)
    if better not in ("min", "max"):
        raise ValueError(f'better wants "min" or "max", got {better!r}')
    if low <= 0 <= high:
        return "open"
    return "holds" if (low > 0) == (better == "max") else "opposite seen"


def entry(
    claim_id: str,
    *,
    measured: str,
    rule: str,
    mean: float | None = None,
    interval: tuple[float, float] | None = None,
    verdict: str,
    note: str = "",
) -> dict[str, Any]:
    """One row of a study's ledger, as JSON keeps it.

    measured  what was compared: metric, split, seeds
    rule      by which the verdict is reached
    mean, interval  of the difference, (low, high); None where the claim is not about one
    Raises ValueError for a claim or a verdict that does not exist, and as `verdict` for the numbers.
    """
    _claim(claim_id)
    if verdict not in VERDICTS:
        raise ValueError(f"no verdict {verdict!r}, there are: {', '.join(VERDICTS)}")
    if mean is not None and not math.isfinite(mean):
        raise ValueError(f"the mean of {claim_id} is {mean}: a ledger holds finite numbers, or None")
    return {
        "claim": claim_id,
        "measured": measured,
        "rule": rule,
        "mean": None if mean is None else float(mean),
        "interval": None if interval is None else list(_bounds(*interval)),
        "verdict": verdict,
        "note": note,
    }


def rows(entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Entries beside what the paper says, indexed by claim: text, and the numbers mean, low and high.

    Raises ValueError for an entry whose claim does not exist.
    """
    found = []
    for each in entries:
        claim, (low, high) = _claim(each["claim"]), each["interval"] or (None, None)
        said = (claim.id, claim.where, claim.claim, _text(claim.numbers), claim.tables_say)
        ours = (each["measured"], each["mean"], low, high, each["verdict"], each["rule"], each["note"])
        found.append((*said, *ours))
    frame = pd.DataFrame(found, columns=list(COLUMNS)).set_index("claim")
    return frame.astype({"mean": float, "low": float, "high": float})


def _read(paper: str) -> dict[str, Any]:
    path = PAPERS / f"{paper}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in PAPERS.glob("*.json")))
        raise ValueError(f"no claims of {paper!r}, there are those of: {there}")
    return json.loads(path.read_text("utf-8"))


def _claim(claim_id: str) -> Claim:
    found = {
        name: claim for path in sorted(PAPERS.glob("*.json")) for name, claim in claims(path.stem).items()
    }
    if claim_id not in found:
        raise ValueError(f"no claim {claim_id!r}, there are: {', '.join(found)}")
    return found[claim_id]


def _bounds(low: float, high: float) -> tuple[float, float]:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"an interval is two finite numbers, the lower one first, got {low} and {high}")
    return float(low), float(high)


def _text(numbers: Any) -> str:
    """miou 0.448, 0.458; abs_rel 0.287, 0.252"""
    if isinstance(numbers, Mapping):
        return "; ".join(f"{name} {_text(value)}" for name, value in numbers.items())
    if isinstance(numbers, Sequence):
        return ", ".join(str(value) for value in numbers)
    return "" if numbers is None else str(numbers)
