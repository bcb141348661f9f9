"""`python -m kamal_lib.recipes STAGE`: training without Jupyter, in resumable pieces."""

import argparse

from kamal_lib.recipes import PROFILES, trained, whole_game


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage of a run, and what it needs, in resumable pieces; prints its metrics."""
    parser = argparse.ArgumentParser(prog="python -m kamal_lib.recipes", description=main.__doc__)
    parser.add_argument("stage", choices=["teachers", "blocks", "target_net"])
    parser.add_argument("--profile", choices=list(PROFILES))
    parser.add_argument("--data", default="rooms", choices=["rooms", "nyuv2"])
    parser.add_argument("--data-root")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        game = whole_game(options.profile, data=options.data, data_root=options.data_root, seed=options.seed)
        stages = {
            "teachers": tuple(game.teachers.values()),
            "blocks": game.blocks,
            "target_net": (game.target_net,),
        }
        for recipe in stages[options.stage]:
            print(recipe.name(), trained(recipe).metrics)
    except (ValueError, OSError, RuntimeError) as error:  # what a user can mend: the message is enough
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
