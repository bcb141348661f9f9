"""The claims ledger: the numbers as printed, verdicts at their boundaries, entries that fit a study."""

import json
import math

import pytest

from kamal_lib.ledger import claims, entry, rows, table, verdict
from kamal_lib.studies import record
from kamal_lib.viz.tables import ledger_table

TABLES = {"table1": (6, 8), "table2": (3, 8), "table3": (9, 5), "table4": (3, 4)}


def made(claim: str = "KA-18", **changes) -> dict:
    parts = {
        "measured": "mIoU on the test images, 3 seeds",
        "rule": "95 % interval of student − teacher above 0",
        "mean": 0.012,
        "interval": (0.003, 0.02),
        "verdict": "holds",
    }
    return entry(claim, **(parts | changes))


# --- what the paper says ------------------------------------------------------------------------------------


def test_all_claims_are_there_in_order():
    found = claims()
    assert list(found) == [f"KA-{i:02}" for i in range(1, 33)]
    for claim in found.values():
        assert claim.where
        assert claim.claim.endswith(".")
        assert claim.tables_say in {"agrees", "partly", "contradicts", "not printed"}
    contradicted = [name for name, claim in found.items() if claim.tables_say == "contradicts"]
    assert contradicted == ["KA-15", "KA-27"]
    assert all(found[name].remark for name in contradicted)
    with pytest.raises(AttributeError):
        found["KA-01"].claim = "another"


def test_numbers_of_claims_as_printed():
    found = claims("ye2019")
    assert found["KA-16"].numbers == {"params_m_b1_to_b5": [36.9, 31.0, 28.3, 28.0, 27.8]}
    assert found["KA-10"].numbers == {"max_increase_percent": 4}
    assert found["KA-31"].numbers["used_unlabelled"] == 10_000
    assert found["KA-05"].numbers is None


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_complete(name):
    found, (height, width) = table("ye2019", name), TABLES[name]
    columns = found["columns"]
    assert (len(found["rows"]), len(columns)) == (height, width)
    assert found["better"].keys() == found["units"].keys() == set(columns)
    assert set(found["better"].values()) <= {"min", "max"}
    assert found["caption"]
    assert found["notes"]
    for row in found["rows"]:
        assert row.keys() - {"qualifiers"} == {"method", *columns}
        assert set(row.get("qualifiers", {}).values()) <= {"~", ">"}
    if name != "table3":  # there most cells are dashes
        assert sum(value is None for row in found["rows"] for value in row.values()) == (name == "table2") * 5


def test_table_1_as_printed():
    by_method = {row["method"]: row for row in table("ye2019", "table1")["rows"]}
    assert list(by_method)[:2] == ["TeacherNet", "Decoder b1"]
    assert by_method["TeacherNet"]["params_m"] == 55.6
    assert by_method["Decoder b4 (Target-D)"]["abs_rel"] == 0.252
    assert by_method["Decoder b5 (Target-P)"]["miou"] == 0.458
    sums = {
        column: round(sum(row[column] for row in by_method.values()), 3)
        for column in table("ye2019", "table1")["columns"]
    }
    assert sums == dict(
        zip(sums, (207.6, 2.707, 4.106, 1.59, 1.726, 2.851, 4.85, 5.705), strict=True)  # by hand
    )


def test_where_table_1_contradicts_the_text():
    """KA-15, counted from the rows: in which columns which students do not beat the teachers."""
    found = table("ye2019", "table1")
    teacher, *students = found["rows"]
    sign = {"min": -1, "max": 1}
    worse = {
        column: [
            row["method"].split()[1] for row in students if sign[better] * (row[column] - teacher[column]) < 0
        ]
        for column, better in found["better"].items()
    }
    assert {column: names for column, names in worse.items() if names} == {
        "miou": ["b1"],
        "pixel_acc": ["b4"],
        "delta1": ["b1", "b2", "b3", "b4", "b5"],
        "delta2": ["b1", "b2", "b3", "b5"],
        "delta3": ["b1"],
    }


def test_claims_repeat_the_tables():
    """The tables disagree with each other only where a claim says so."""
    one, two, three, four = ({row["method"]: row for row in table("ye2019", name)["rows"]} for name in TABLES)
    found = claims()
    student = two["TargetNet-3"]
    for column, (teacher, ours) in found["KA-23"].numbers.items():
        assert (two["TeacherNet"][column], student[column]) == (teacher, ours)
    assert found["KA-14"].numbers["abs_rel"] == one["Decoder b4 (Target-D)"]["abs_rel"]
    assert found["KA-27"].numbers["abs_rel"] == three["TargetNet"]["abs_rel"] != student["abs_rel"]
    assert found["KA-28"].numbers["miou"] == [four["TeacherNet"]["miou"], four["Target-P"]["miou"]]
    assert found["KA-26"].numbers["padnet_resnet"]["params_m"] == three["PADNet-ResNet [36]"]["params_m"]


def test_papers_tables_and_claims_that_are_not_here():
    with pytest.raises(ValueError, match=r"no claims of 'he2016', there are those of: .*ye2019"):
        claims("he2016")
    with pytest.raises(ValueError, match="no claims of 'he2016'"):
        table("he2016", "table1")
    with pytest.raises(ValueError, match="has no 'table5', its tables are: table1, table2, table3, table4"):
        table("ye2019", "table5")


# --- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better"),
    [
        (0.001, 0.02, "holds"),
        (1e-300, 1.0, "holds"),
        (2.0, 2.0, "holds"),
        (-0.01, 0.02, "open"),
        (0.0, 0.02, "open"),
        (-0.02, 0.0, "open"),
        (-0.0, 0.0, "open"),
        (-0.02, -0.001, "opposite seen"),
    ],
)
def test_verdicts(low, high, higher_is_better):
    assert verdict(low, high, "max") == higher_is_better
    assert verdict(-high, -low, "min") == higher_is_better


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 0.1), (math.nan, 0.1), (0.1, math.nan), (-math.inf, 0.1), (0.1, math.inf)]
)
def test_intervals_that_are_none(low, high):
    with pytest.raises(ValueError, match="two finite numbers, the lower one first, got"):
        verdict(low, high, "max")
    with pytest.raises(ValueError, match="two finite numbers"):
        made(interval=(low, high))


def test_a_direction_that_does_not_exist():
    with pytest.raises(ValueError, match='"min" or "max", got \'higher\''):
        verdict(0.1, 0.2, "higher")


# --- entries ------------------------------------------------------------------------------------------------


def test_an_entry_is_json_and_fits_a_section(tmp_path):
    found = made()
    assert found == {
        "claim": "KA-18",
        "measured": "mIoU on the test images, 3 seeds",
        "rule": "95 % interval of student − teacher above 0",
        "mean": 0.012,
        "interval": [0.003, 0.02],
        "verdict": "holds",
        "note": "",
    }
    record("ka", "quick", "rooms", {"runs": [], "ledger": [found]}, folder=tmp_path)
    kept = json.loads((tmp_path / "ka.quick.json").read_text("utf-8"))["data"]["rooms"]["ledger"]
    assert kept == [found]
    assert rows(kept).equals(rows([found]))


def test_entries_that_cannot_be():
    with pytest.raises(ValueError, match=r"no claim 'KA-33', there are: .*KA-01, KA-02.*KA-32"):
        made("KA-33")
    with pytest.raises(ValueError, match="no verdict 'true', there are: holds, open, opposite seen"):
        made(verdict="true")
    with pytest.raises(ValueError, match="the mean of KA-18 is nan: a ledger holds finite numbers"):
        made(mean=math.nan)
    with pytest.raises(ValueError, match="no claim 'KA-00'"):
        rows([made() | {"claim": "KA-00"}])


def test_rows_put_both_sides_together():
    found = rows([made(), made("KA-05", mean=None, interval=None, note="by construction")])
    assert list(found.index) == ["KA-18", "KA-05"]
    first, second = found.loc["KA-18"], found.loc["KA-05"]
    assert first["the paper claims"] == claims()["KA-18"].claim
    assert (first["where"], first["its tables"]) == ("Table 1", "agrees")
    assert first["it prints"].startswith("miou_teacher 0.448; miou_student 0.458; pixel_acc_teacher 0.684")
    assert (first["mean"], first["low"], first["high"]) == (0.012, 0.003, 0.02)
    assert second["it prints"] == ""
    assert math.isnan(second["low"])
    assert second["note"] == "by construction"
    assert rows([made("KA-16")]).loc["KA-16", "it prints"] == "params_m_b1_to_b5 36.9, 31.0, 28.3, 28.0, 27.8"
    nested = rows([made("KA-26")]).loc["KA-26", "it prints"]
    assert nested.startswith("target params_m 28; miou 0.459")
    assert list(rows([]).columns) == list(found.columns)


def test_a_ledger_to_read():
    entries = [
        made(),
        made("KA-05", mean=None, interval=None),
        made("KA-10", mean=-3.3, interval=None, verdict="opposite seen"),
    ]
    shown = ledger_table(rows(entries))
    found = shown.data
    assert list(found.columns) == [
        *("the paper claims", "it prints", "measured here", "found", "verdict", "note")
    ]
    assert claims()["KA-10"].claim in shown.to_html()  # whole, whatever its length
    assert list(found["found"]) == ["+0.012 [+0.003, +0.020]", "–", "-3.300"]
    assert found.loc["KA-05", "it prints"] == "–"
    assert list(ledger_table(rows(entries[:1]), digits=1).data["found"]) == ["+0.0 [+0.0, +0.0]"]
    assert len(ledger_table(rows([])).data) == 0
