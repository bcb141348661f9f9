"""What studies leave behind: hashes of recipes, merged files, intervals that mean what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kamal_lib import studies
from kamal_lib.metrics import DepthErrors, SegmentationScores, image_states
from kamal_lib.recipes import NYUv2Data, label_curve, task_teachers, three_teachers, two_teachers
from kamal_lib.recipes.skd import GROUPS, skd
from kamal_lib.studies import bootstrap, committed, config_hash, interval, record, stale
from kamal_lib.tasks import Depth, Segmentation


def test_a_hash_is_that_of_what_was_asked_not_of_the_machine():
    teacher = task_teachers("quick", seed=1)["depth"]
    faster = replace(teacher, schedule=replace(teacher.schedule, precision="64-true", device="gpu"))
    assert config_hash(teacher) == config_hash(faster)
    for other in (
        replace(teacher, labels=100),
        replace(teacher, task="normals"),
        replace(teacher, schedule=replace(teacher.schedule, epochs=3)),
        replace(teacher, start=replace(teacher.start, seed=2)),
    ):
        assert config_hash(teacher) != config_hash(other)
    here, there = (replace(teacher, data=NYUv2Data(root, (24, 32))) for root in ("a", "b"))
    assert config_hash(here) == config_hash(there)


def test_sections_are_merged_and_attempts_kept(tmp_path):
    one, two = {"config": "1"}, {"config": "2"}
    record("s", "quick", "rooms", {"runs": [one], "attempts": ["first"]}, folder=tmp_path)
    record("s", "quick", "nyuv2", {"runs": [two], "attempts": ["other"]}, folder=tmp_path)
    record("s", "quick", "rooms", {"runs": [one, two], "attempts": ["second"]}, folder=tmp_path)
    found = committed("s", "quick", folder=tmp_path)
    assert found["data"]["rooms"] == {"runs": [one, two], "attempts": ["first", "second"]}
    assert found["data"]["nyuv2"]["runs"] == [two]
    assert [path.name for path in tmp_path.iterdir()] == ["s.quick.json"]
    with pytest.raises(ValueError, match="nan"):  # a result that is no number is not written
        record("s", "quick", "rooms", {"runs": [one, two], "mean": float("nan")}, folder=tmp_path)
    assert committed("s", "quick", folder=tmp_path) == found


def test_a_trial_does_not_replace_a_larger_run(tmp_path):
    one, two = {"config": "1"}, {"config": "2"}
    whole = record("s", "quick", "rooms", {"runs": [one, two]}, folder=tmp_path)
    before = whole.read_bytes()
    trial = record("s", "quick", "rooms", {"runs": [two]}, folder=tmp_path)
    assert trial.name == "s.quick.trial.json"
    assert json.loads(trial.read_text("utf-8"))["data"]["rooms"]["runs"] == [two]
    assert whole.read_bytes() == before


def test_missing_results_say_what_there_is_and_how_to_make_them(tmp_path):
    record("one", "quick", "rooms", {"runs": []}, folder=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no results two.gpu.json, there are: one.quick.json.*--study two"
    ):
        committed("two", "gpu", folder=tmp_path)


def test_stale_names_recipes_without_a_run():
    recipes = label_curve("smoke", seed=1)
    section = {"runs": [{"config": config_hash(recipe)} for recipe in recipes]}
    assert stale(section, recipes) == []
    changed = replace(recipes[0], scale=(1.0, 1.2))
    assert stale(section, [*recipes, changed]) == [config_hash(changed)]


def test_committed_results_are_those_of_todays_recipes():
    """Rooms only: the sizes of NYUDv2's parts are known where its files are."""
    for path in studies.RESULTS.glob("teachers.*.json"):
        found = json.loads(path.read_text("utf-8"))
        section = found["data"]["rooms"]
        recipes = [r for seed in section["seeds"] for r in label_curve(found["profile"], seed=seed)]
        assert stale(section, recipes) == [], f"{path.name} is stale: run the study again"
        assert len(section["runs"]) == len(recipes)


def depth_states(images: int, seed: int, noise: float):
    g = torch.Generator().manual_seed(seed)
    truth = 1 + 4 * torch.rand(images, 4, 5, generator=g)
    return image_states(DepthErrors(), truth * (1 + noise * torch.rand(images, 1, 1, generator=g)), truth)


def test_one_seed_and_equal_images_leave_no_interval():
    truth = torch.tensor([[[0, 1, 1]]]).expand(6, 1, 3)
    states = image_states(SegmentationScores(2), torch.tensor([[[0, 1, 0]]]).expand(6, 1, 3), truth)
    low, high = interval(bootstrap(SegmentationScores(2), [states], shared_images=False, draws=20)["miou"])
    assert low == high == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_the_interval_is_that_of_a_mean_over_images():
    """One seed, equal pixels an image: abs rel is a mean of n numbers, whose standard error is known."""
    states = depth_states(200, 0, 0.5)
    per_image = (states["sums"][:, 0] / states["count"]).numpy()
    values = bootstrap(DepthErrors(), [states], shared_images=False, draws=600)["abs_rel"]
    assert values.mean() == pytest.approx(per_image.mean(), abs=0.003)
    assert values.std() == pytest.approx(per_image.std() / np.sqrt(200), rel=0.15)


def test_seeds_are_resampled_too_and_differences_are_paired():
    near, far = depth_states(50, 0, 0.1), depth_states(50, 1, 0.9)
    one = bootstrap(DepthErrors(), [near, far], shared_images=False, draws=200)["abs_rel"]
    gap = float((far["sums"][:, 0] / far["count"]).mean() - (near["sums"][:, 0] / near["count"]).mean())
    # two seeds drawn with replacement: half the draws take both, a quarter each takes one of them twice
    assert one.std() == pytest.approx(gap * np.sqrt(1 / 8), rel=0.2)
    worse = [{name: rows * 1.0 for name, rows in each.items()} for each in (near, far)]
    for each in worse:
        each["sums"][:, 0] += 0.01 * each["count"]
    difference = bootstrap(DepthErrors(), worse, shared_images=False, draws=200)["abs_rel"] - one
    assert difference == pytest.approx(np.full(200, 0.01))


def test_images_that_all_seeds_share_are_resampled_once():
    """Three seeds with equal results on equal images are worth one seed; on images of their own, three."""
    states = [depth_states(100, 0, 0.5)] * 3
    per_image = (states[0]["sums"][:, 0] / states[0]["count"]).numpy()
    error = per_image.std() / np.sqrt(100)
    shared, apart = (
        bootstrap(DepthErrors(), states, shared_images=which, draws=600)["abs_rel"] for which in (True, False)
    )
    assert shared.std() == pytest.approx(error, rel=0.15)
    assert apart.std() == pytest.approx(error / np.sqrt(3), rel=0.15)


# --- rows and their differences -----------------------------------------------------------------------------

TASKS = {"segmentation": Segmentation(("a", "b")), "depth": Depth()}


def confusion(right: list[int], wrong: list[int]) -> dict[str, torch.Tensor]:
    """Image by image: so many right and so many wrong pixels of each of two classes."""
    rows = [[[r, w], [w, r]] for r, w in zip(right, wrong, strict=True)]  # truth × prediction
    return {"segmentation.confusion": torch.tensor(rows)}


def measured() -> studies.Measurements:
    found = studies.Measurements(TASKS, shared_images=True, draws=200)
    for seed in (1, 2, 3):
        found.add("good", seed, confusion([9, 8, 9, 8, 9 + seed], [1, 2, 1, 2, 1]))
        found.add("bad", seed, confusion([5, 4, 5, 4, 5 + seed], [5, 6, 5, 6, 5]))
    found.add("late", 3, confusion([9, 8, 9, 8, 12], [1, 2, 1, 2, 1]))
    return found


def test_scores_are_those_of_all_images_together():
    found = measured()
    assert found.scores["good"][1]["pixel_acc"] == pytest.approx(2 * 44 / (2 * 51))
    score = found.score("good", "pixel_acc")
    assert score["by_seed"] == [pytest.approx((43 + s) / (50 + s)) for s in (1, 2, 3)]
    assert score["low"] < score["mean"] < score["high"]


def test_paired_differences_and_their_verdicts():
    found = measured()
    one = found.compare("good", "bad", "miou")
    assert one["low"] > 0
    assert one["verdict"] == "holds"
    assert found.compare("bad", "good", "miou")["verdict"] == "opposite seen"
    same = found.compare("late", "good", "miou")
    assert same["seeds"] == [3]
    assert (same["low"], same["difference"], same["high"], same["verdict"]) == (0, 0, 0, "open")
    assert found.compare("late", "good", "miou", margin=0.05)["verdict"] == "holds"
    assert found.compare("bad", "good", "miou", margin=0.05)["verdict"] == "opposite seen"
    found.add("other", 7, confusion([1], [1]))
    with pytest.raises(ValueError, match="'other' and 'good' have no seed in common"):
        found.compare("other", "good", "miou")


def test_a_difference_of_differences_is_drawn_as_one():
    """(2·good − bad) − good = good − bad, in the same draws; a row of other seeds is refused."""
    found = measured()
    plain = found.compare("good", "bad", "miou")
    both = found.combine("steps", {"good": 1, "bad": -1}, "miou")
    for name in ("difference", "low", "high", "by_seed", "verdict"):
        assert both[name] == pytest.approx(plain[name]) if name != "verdict" else plain[name]
    assert (both["row"], both["seeds"]) == ("steps", [1, 2, 3])
    twice = found.combine("twice", {"good": 2, "bad": -2}, "miou")
    assert twice["low"] == pytest.approx(2 * plain["low"])
    assert found.combine("less", {"good": -1, "bad": 1}, "miou")["verdict"] == "opposite seen"
    with pytest.raises(ValueError, match="not measured on the same seeds"):
        found.combine("late", {"late": 1, "bad": -1}, "miou")


def test_shared_images_make_wider_intervals_than_images_apart():
    """Three seeds on the same images: drawn together, what one resample has too much of is not levelled."""
    g = torch.Generator().manual_seed(0)
    states = [confusion((right := torch.randint(0, 11, (40,), generator=g)).tolist(), (10 - right).tolist())]
    widths = {}
    for shared in (True, False):
        found = studies.Measurements(TASKS, shared_images=shared, draws=400)
        for seed in (1, 2, 3):
            found.add("row", seed, states[0])
        score = found.score("row", "pixel_acc")
        widths[shared] = score["high"] - score["low"]
    assert widths[True] > 1.4 * widths[False]  # the square root of 3, nearly


def test_a_margin_points_the_right_way_where_less_is_better():
    """abs rel 0.10 and 0.103: 3 % worse is on a par within 5 %, 7 % worse is not."""
    found = studies.Measurements(TASKS, shared_images=True, draws=100)
    names = tuple(Depth().metric().metric_state)
    for row, errors in (("reference", 0.1), ("near", 0.103), ("far", 0.107)):
        truth = torch.full((4, 2, 2), 2.0)
        states = image_states(Depth().metric(), truth * (1 + errors), truth)
        assert set(states) == set(names)
        for seed in (1, 2):
            found.add(row, seed, {f"depth.{name}": value for name, value in states.items()})
    assert found.compare("near", "reference", "abs_rel")["verdict"] == "opposite seen"
    assert found.compare("near", "reference", "abs_rel", margin=0.05)["verdict"] == "holds"
    assert found.compare("far", "reference", "abs_rel", margin=0.05)["verdict"] == "opposite seen"


def test_verdicts_on_several_scores():
    assert studies.together(["holds", "holds"]) == "holds"
    assert studies.together(["holds", "open"]) == "open"
    assert studies.together(["holds", "open", "opposite seen"]) == "opposite seen"
    assert studies.together([]) == "open"


@pytest.mark.parametrize("study", ["ka_two_teachers", "ka_options", "ka_conditions", "ka_three_teachers"])
def test_committed_rows_are_those_of_todays_recipes(study):
    """Every run in the file is one that today's recipes ask for, and no network of a row is missing."""
    groups = {
        "ka_options": ["options"],
        "ka_conditions": ["core", "conditions"],
        "ka_three_teachers": ["core", "controls", "orders"],
    }.get(study, ["core", "table", "baselines"])
    recipes_of = three_teachers if study == "ka_three_teachers" else two_teachers
    usual = {"teachers": "as usual: teachers", "final": "as usual"}
    called = usual if study == "ka_conditions" else {}
    for path in studies.RESULTS.glob(f"{study}.*.json"):
        found = json.loads(path.read_text("utf-8"))
        if "trial" in path.name or found["profile"] == "smoke":
            continue
        section = found["data"]["rooms"]
        measured = {(run["row"], run["seed"], run["config"]) for run in section["runs"]}
        for seed in section["seeds"]:
            asked = {
                (called.get(row, row), seed, config_hash(network))
                for group in groups
                for row, networks in recipes_of(group, found["profile"], seed=seed).items()
                for network in networks
            }
            rows = {row for row, of, _ in measured if of == seed}
            here = {each for each in measured if each[1] == seed and ": self-distilled" not in each[0]}
            assert {each for each in asked if each[0] in rows} == here, f"{path.name} is stale: run it again"


def test_committed_rows_of_structured_distillation_are_those_of_todays_recipes():
    """On rooms; how many epochs CamVid's students take depends on how many images there are."""
    section = committed("skd")["data"]["rooms"]
    measured = {(run["row"], run["seed"], run["config"]) for run in section["runs"]}
    asked = {
        (row, seed, config_hash(network))
        for seed in section["seeds"]
        for group in GROUPS
        for row, (network,) in skd(group, "quick", seed=seed).items()
    }
    assert asked == measured, "skd.quick.json is stale: run it again"


def test_the_readme_says_what_the_study_measured():
    """Its three differences with their intervals, as numbers in the text."""
    readme = (studies.RESULTS.parents[2] / "README.md").read_text("utf-8")
    sections = committed("ka_two_teachers")["data"]
    for data, metric in (("rooms", "miou"), ("nyuv2", "miou"), ("nyuv2", "abs_rel")):
        rows = sections[data]["against teachers"]
        (row,) = (r for r in rows if (r["row"], r["metric"]) == ("final", metric))
        numbers = (f"{row[name]:+.3f}".replace("-", "−") for name in ("difference", "low", "high"))
        mean, low, high = numbers
        assert any(f"{mean}, {words}{low} to {high}" in readme for words in ("", "95 % interval "))
    steps = committed("skd")["data"]["rooms"]["added"]
    gains = [steps[student][-1] for student in ("(1.0)", "(0.5)")]
    assert {gain["verdict"] for gain in gains} == {"holds"}
    assert "by {:.3f} and {:.3f} for sure".format(*(gain["difference"] for gain in gains)) in readme
