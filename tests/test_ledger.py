"""The claims ledger: the numbers as printed, verdicts at their boundaries, entries that fit a study."""

import json
import math
import re
from statistics import mean

import pytest

from kamal_lib.ledger import claims, entry, rows, table, verdict
from kamal_lib.studies import record
from kamal_lib.viz.tables import ledger_table

TABLES = {"table1": (6, 8), "table2": (3, 8), "table3": (9, 5), "table4": (3, 4)}
SKD_TABLES = {
    "table1": (13, 2),
    "table2": (15, 1),
    "table3": (7, 1),
    "table4": (3, 20),
    "table5": (5, 2),
    "table6": (0, 1),
    "table7": (18, 4),
    "table8": (14, 2),
    "table9": (10, 3),
    "table10": (0, 1),
    "table11": (8, 7),
    "table12": (5, 6),
    "table13": (0, 6),
    "table14": (9, 7),
    "figure7": (2, 1),
    "figure10": (2, 1),
}


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


# --- structured knowledge distillation ----------------------------------------------------------------------

THREE = ("ResNet18 (0.5)", "ResNet18 (1.0)", "ResNet18 (1.0) from ImageNet")
TERMS = ("", " + PI", " + PI + PA", " + PI + PA + HO")


def skd(name: str) -> dict[str, dict]:
    """{method: row} of a table of Liu et al."""
    return {row["method"]: row for row in table("liu_skd", name)["rows"]}


def test_all_claims_of_skd_are_there_in_order():
    found = claims("liu_skd")
    assert list(found) == [f"SKD-{i:02}" for i in range(1, 41)]
    assert not found.keys() & claims().keys()
    for claim in found.values():
        assert claim.where
        assert claim.claim.endswith(".")
        assert claim.remark == "" or claim.remark.endswith(".")
    says = {
        kind: [int(name[-2:]) for name, claim in found.items() if claim.tables_say == kind]
        for kind in ("partly", "contradicts", "not printed", "unreadable")
    }
    assert says == {
        "partly": [11, 24, 29, 30, 31],
        "contradicts": [10],
        "not printed": [5, 21, 26, 27, 38],
        "unreadable": [22, 32, 33, 37],
    }
    assert {c.tables_say for c in found.values()} == {"agrees", *says}
    assert all(found[f"SKD-{i}"].remark for kind in ("partly", "contradicts") for i in says[kind])


@pytest.mark.parametrize("name", SKD_TABLES)
def test_tables_of_skd_are_complete(name):
    found, (height, width) = table("liu_skd", name), SKD_TABLES[name]
    columns, labels = found["columns"], found.get("labels", [])
    assert (len(found["rows"]), len(columns)) == (height, width)
    assert found["better"].keys() == found["units"].keys() == set(columns)
    assert set(found["better"].values()) <= {"min", "max"}
    assert found["caption"]
    assert found["notes"]
    assert height or "could not be read" in found["notes"][0]
    assert len({row["method"] for row in found["rows"]}) == height
    for row in found["rows"]:
        assert row.keys() - {"spread"} == {"method", *labels, *columns}
        assert all(row[column] is None or isinstance(row[column], int | float) for column in columns)
        assert all(row[column] is not None for column in row.get("spread", {}))
    dashes = {"table5": 1, "table7": 8, "table11": 3, "table14": 1}  # and AOB's size, which could not be read
    assert sum(row[column] is None for row in found["rows"] for column in columns) == dashes.get(name, 0)


def test_numbers_of_skd_as_printed():
    best = skd("table1")["ResNet18 (1.0) from ImageNet + PI + PA + HO"]
    assert (best["val_miou"], best["spread"]["val_miou"]) == (74.08, 0.13)
    assert (best["train_miou"], best["spread"]["train_miou"]) == (78.75, 0.02)
    assert "spread" not in skd("table1")["Teacher"]
    assert skd("table2")["nodes of 2×2"]["val_miou"] == 71.78
    assert skd("table5")["Student w/o D"]["score_difference"] == 2.28
    assert skd("table7")["MobileNetV2Plus (ours)"]["params_m"] == 8.301
    assert skd("table11")["VNL (student) w/ distillation"]["rel"] == 0.13
    assert skd("table12")["Ours"]["ap_s"] == 18.5
    assert skd("table14")["FCOS (student) w/ distillation"]["time_ms"] == 45
    assert skd("figure7")["Bus"]["iou_gain"] == 17.23
    assert claims("liu_skd")["SKD-05"].numbers == {"lambda1": 10, "lambda2": 0.1}


def test_claims_of_skd_repeat_the_tables():
    found, one, seven, eight = claims("liu_skd"), skd("table1"), skd("table7"), skd("table8")
    for student in THREE:
        column = [one[student + terms]["val_miou"] for terms in TERMS]
        assert found["SKD-06"].numbers[student] == column
        assert found["SKD-07"].numbers[student] == column[:2]
        assert found["SKD-09"].numbers[student] == column[2:]
    ranges = [row["val_miou"] for row in skd("table2").values() if row["beta"] == "1×1"]
    assert found["SKD-14"].numbers == {"from the shortest range to the full graph": ranges}
    assert found["SKD-19"].numbers == {
        name: [skd("table4")[critic][name] for critic in ("D no attention", "D Ours")]
        for name in ("truck", "bus", "train", "motorcycle")
    }
    for name, pair in found["SKD-23"].numbers.items():
        network, split = name.split(" on ")
        plain = network if network in seven else next(n for n in seven if n.startswith(f"{network} ["))
        assert pair == [seven[n][f"{split}_miou"] for n in (plain, f"{network} (ours)")]
        assert seven[plain]["params_m"] == seven[f"{network} (ours)"]["params_m"]  # SKD-03
    for name, pair in found["SKD-28"].numbers.items():
        plain = next(n for n in eight if n in (name, f"{name} [15]"))
        assert pair == [eight[plain]["miou"], eight[f"{name} (ours)"]["miou"]]
        assert found["SKD-29"].numbers[name] == eight[f"{name} (ours, unlabelled)"]["miou"]
    students = [skd("table11")[f"VNL (student){end}"] for end in ("", " w/ distillation")]
    for column, pair in list(found["SKD-34"].numbers.items())[:-1]:
        assert pair == [row[column] for row in students]
    assert found["SKD-36"].numbers == {
        column: [skd("table12")[name][column] for name in ("student", "Ours")]
        for column in ("ap75", "ap_s", "ap_l")
    }


def test_where_table_1_of_skd_contradicts_the_text():
    """SKD-10 and SKD-11: the gains of all three terms, from the rows."""
    one = skd("table1")
    gains = [round(one[s + TERMS[-1]]["val_miou"] - one[s]["val_miou"], 2) for s in THREE]
    assert gains == [6.98, 7.18, 4.98]
    claim = claims("liu_skd")["SKD-10"]
    assert list(claim.numbers.values()) == [6.26, 5.74, 2.9]
    assert [float(n) for n in re.findall(r"\d\.\d+", claim.remark)] == gains
    assert gains[1] > gains[0]  # the larger student gains more


def test_connections_of_table_2_follow_from_range_and_nodes():
    """As shares of all pairs of pixels: nodes × range / N, both as shares of N."""
    powers = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    printed = {}
    for name, row in skd("table2").items():
        if row["connections"] is not None:
            factor, divisor = re.fullmatch(r"(?:(\d+) · )?N²(?:/(.+))?", row["connections"]).groups()
            base, power = re.fullmatch(r"(\d)(\D*)", divisor or "1").groups()
            printed[name] = int(factor or 1) / int(base) ** int(power.translate(powers) or 1)
    ranges = {f"range W'/{n} × H'/{n}": 1 / n**2 for n in (16, 8, 4, 2)} | {"range W' × H'": 1.0}
    nodes = {f"nodes of {n}×{n}": (1 / n**2) ** 2 for n in (2, 4, 8, 16, 32)}
    fusions = {
        "α fusion": sum(1 / 4 * 1 / n**2 for n in (2, 4, 8)),
        "β fusion": sum((1 / n**2) ** 2 for n in (2, 4, 8)),
        "feature-level fusion": 3 * (1 / 4) ** 2,
    }
    assert printed == ranges | nodes | fusions
    assert printed["nodes of 2×2"] == printed["range W'/4 × H'/4"]  # SKD-04's pairs
    assert printed["nodes of 4×4"] == printed["range W'/16 × H'/16"]


def test_classes_of_table_4_give_its_miou():
    found = table("liu_skd", "table4")
    classes = found["columns"][1:]
    for row in found["rows"]:
        assert round(mean(row[name] for name in classes), 2) == row["miou"]
    plain, ours = skd("table4")["D no attention"], skd("table4")["D Ours"]
    worse = [name.replace("_", " ") for name in classes if ours[name] < plain[name]]
    assert len(worse) == 12
    assert ", ".join(worse[:-1]) + f" and {worse[-1]}." in found["notes"][-1]


def test_gains_of_skd_that_the_text_gives_otherwise():
    """SKD-24, SKD-25, SKD-29, SKD-30, SKD-31 and SKD-37, from the rows."""
    seven, eight, nine, twelve = (skd(f"table{i}") for i in (7, 8, 9, 12))
    gains = {
        name.removesuffix(" (ours)"): round(row["val_miou"] - before["val_miou"], 1)
        for before, (name, row) in zip(seven.values(), list(seven.items())[1:], strict=False)
        if name.endswith("(ours)")
    }
    assert list(gains.items()) == [
        *(("ESPNet-C", 6.6), ("ESPNet", 2.4), ("ResNet18 (0.5)", 7.3), ("ResNet18 (1.0)", 6.2)),
        ("MobileNetV2Plus", 4.4),
    ]
    assert seven["MobileNetV2Plus (ours)"]["flops_g"] / seven["MD [12]"]["flops_g"] == pytest.approx(
        4 / 3, 0.01
    )
    for name, percent in (("ESPNet-C", 13.05), ("ESPNet", 12.63)):
        relative = eight[f"{name} (ours, unlabelled)"]["miou"] / eight[f"{name} [15]"]["miou"] - 1
        assert round(100 * relative, 2) == percent
        assert f"{percent} %" in claims("liu_skd")["SKD-29"].remark
    for name, cited, points in (("ESPNet", 15, 4.16), ("ResNet18", 66, 2.78), ("MobileNetV2", 66, 3.74)):
        assert round(nine[f"{name} (ours)"]["miou"] - nine[f"{name} [{cited}]"]["miou"], 2) == points
    assert round(twelve["Ours"]["ap"] - twelve["student"]["ap"], 1) == 1.1
    columns = table("liu_skd", "table12")["columns"]
    assert all(twelve["+ PA"][name] > twelve["+ MIMIC [11]"][name] for name in columns)  # SKD-35


def test_two_papers_in_one_ledger():
    found = rows([made("SKD-10"), made("KA-18"), made("SKD-04")])
    assert list(found.index) == ["SKD-10", "KA-18", "SKD-04"]
    assert found.loc["KA-18", "the paper claims"] == claims("ye2019")["KA-18"].claim
    assert found.loc["SKD-10", "its tables"] == "contradicts"
    assert found.loc["SKD-10", "it prints"] == (
        "ResNet18 (0.5) 6.26; ResNet18 (1.0) 5.74; ResNet18 (1.0) from ImageNet 2.9"
    )
    assert found.loc["SKD-04", "it prints"].startswith(
        "N²/2⁴ connections, by range and by nodes 71.09, 71.78;"
    )
    with pytest.raises(ValueError, match=r"no claim 'SKD-41', there are: .*SKD-40.*KA-32"):
        made("SKD-41")


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
