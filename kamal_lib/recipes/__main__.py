"""`python -m kamal_lib.recipes STAGE`: training without Jupyter, in resumable pieces; or `torchrun -m`."""

import argparse

from kamal_lib.engine import make_fabric
from kamal_lib.processes import processes
from kamal_lib.recipes import (
    PROFILES,
    ImageScores,
    label_curve,
    task_teachers,
    trained,
    whole_game,
)
from kamal_lib.recipes.data import DATA
from kamal_lib.recipes.skd import GROUPS as SKD
from kamal_lib.recipes.skd import skd
from kamal_lib.recipes.structured import SegmenterScores
from kamal_lib.recipes.three_teachers import GROUPS as THREE
from kamal_lib.recipes.three_teachers import three_teachers
from kamal_lib.recipes.two_teachers import GROUPS as TWO
from kamal_lib.recipes.two_teachers import two_teachers

STUDIES = {
    "two_teachers": (two_teachers, TWO, ImageScores),
    "three_teachers": (three_teachers, THREE, ImageScores),
    "skd": (skd, SKD, SegmenterScores),
}
"""{stage: what gives its recipes, its groups of rows, the recipe that measures them}"""
STAGES = ("teachers", "blocks", "target_net", "label_curve", *STUDIES)


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage of a run, and what it needs, in resumable pieces; prints its metrics."""
    groups = "; ".join(f"{stage}: {', '.join(rows)}" for stage, (_, rows, _) in STUDIES.items())
    parser = argparse.ArgumentParser(prog="python -m kamal_lib.recipes", description=main.__doc__)
    parser.add_argument("stage", choices=STAGES, help="a study's stage trains one group of its rows")
    parser.add_argument("--rows", choices=list(TWO | THREE | SKD), help=groups)
    parser.add_argument("--profile", choices=list(PROFILES))
    parser.add_argument("--data", default="rooms", choices=list(DATA), help="the last two for skd only")
    parser.add_argument("--data-root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default="random", choices=["random", "imagenet"])
    options = parser.parse_args(arguments)
    if options.stage in ("label_curve", *STUDIES) and options.start != "random":
        parser.error(f"the study's rule starts all teachers at random: leave --start out for {options.stage}")
    if options.rows not in STUDIES.get(options.stage, (None, (None,), None))[1]:
        wanted = (
            f"{options.stage} needs --rows"
            if options.rows is None
            else f"--rows {options.rows} does not go with {options.stage}"
        )
        parser.error(f"{wanted}; {groups}")
    first = processes()[1] == 0  # one of torchrun's processes speaks for all
    try:
        run = {"data": options.data, "data_root": options.data_root, "seed": options.seed}
        make_fabric(task_teachers(options.profile)["depth"].schedule.device)  # no GPU: said first
        if options.stage == "label_curve":
            for teacher in label_curve(options.profile, **run):
                trained(ImageScores(teacher))  # of the teacher, which is trained first
                found = trained(teacher).metrics["test"]
                if first:
                    print(teacher.name(), teacher.labels or "usual", "labels", found)
            return
        if options.stage in STUDIES:
            of_study, _, scores_of = STUDIES[options.stage]
            for row, networks in of_study(options.rows, options.profile, **run).items():
                for network in networks:
                    trained(scores_of(network))  # of the network, which is trained first
                    if first:
                        print(row, trained(network).metrics["validation"])
            return
        if options.stage == "teachers":
            recipes = [*task_teachers(options.profile, **run, start=options.start).values()]
        else:
            game = whole_game(options.profile, **run, start=options.start)
            recipes = game.blocks if options.stage == "blocks" else (game.target_net,)
        for recipe in recipes:
            found = trained(recipe).metrics
            if first:
                print(recipe.name(), found)
    except (ValueError, OSError, RuntimeError) as error:  # what a user can mend: the message is enough
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped; run it again, and it goes on from its last checkpoint\n")


if __name__ == "__main__":
    main()
