"""Trains a table of models, with several seeds each, and reports how well each does at its end.

    python scripts/compare.py RECIPE --data-path DATA --output FOLDER [-- arguments]

RECIPE is a YAML file with the `arguments` that all runs share, `seeds`, and `models`, whose own
arguments stand by their names. They are those of main.py, or with `program: mlm.pretrain` a
configuration and `key=value`, in which `$DATA` is the --data-path; `fine_tune`, likewise of
mlm.glue, is what each run of it ends with. `vary` holds values of arguments, each of which makes
a model of its own: the table has the best of each model before all of them.

Several runs at once share each GPU. Called again it goes on where every run stands, so that the
whole can be spread over many short leases of a machine: with `--minutes 9`, runs that have not
ended by then save and leave, and once speeds are known only runs start that can end. `--report`
trains nothing and writes comparison.md and comparison.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commands import open_streams
from errors import UserError
from journal import require_writable
from locking import only_run_in
from processes import World
from scripts.comparing.recipes import check_data, read_recipe
from scripts.comparing.report import report
from scripts.comparing.scheduling import Scheduler


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path)
    add("--output", type=Path, required=True, help="folder for a folder of each run")
    add("--data-path", default="", help="as main.py takes it, or the folder of get_text.sh")
    add("--models", nargs="+", default=[], help="names in the recipe, instead of all")
    add("--seeds", nargs="+", default=[], type=int, help="instead of those in the recipe")
    add("--vary", nargs="+", default=[], action="append", metavar=("ARGUMENT", "VALUE"),
        help="each model with each value, as in lr 5e-4 1e-3, instead of the recipe's")  # fmt: skip
    add("--concurrent", default=1, type=int, metavar="N",
        help="runs at once on each GPU, or on the CPU (default: %(default)s)")  # fmt: skip
    add("--minutes", default=float("inf"), type=float, metavar="X",
        help="then runs save and leave (default: when all have ended)")  # fmt: skip
    add("--keep-checkpoints", action="store_true", help="of finished runs, too")
    add("--report", action="store_true", help="train nothing, write the table and the plot")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    open_streams()
    parser = get_args_parser()
    # argparse itself loses what follows -- behind an option.
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args, more = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    try:
        if args.concurrent < 1 or not args.minutes > 0:
            raise UserError("--concurrent must be at least 1, and --minutes above 0.")
        runs = read_recipe(args.recipe, args.output, models=args.models, seeds=args.seeds,
                           more=more, vary=args.vary)  # fmt: skip
        for folder in (args.output, *(run.folder for run in runs)):
            require_writable(folder, World(), "--output")
        if args.report:
            report(runs, args.output)
            return
        check_data(runs, args.data_path)
        scheduler = Scheduler(
            runs,
            args.data_path,
            concurrent=args.concurrent,
            seconds=60 * args.minutes,
            keep_checkpoints=args.keep_checkpoints,
        )
        with only_run_in(args.output, World(), "--output"):
            scheduler.work()
    except UserError as error:
        parser.exit(2, f"compare.py: error: {error}\n")
    finished = sum(run.is_finished for run in runs)
    print(f"{finished} of {len(runs)} runs are finished")
    if scheduler.failed:
        parser.exit(1, f"compare.py: error: {len(scheduler.failed)} runs failed.\n")


if __name__ == "__main__":
    main()
