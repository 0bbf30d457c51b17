"""Runs main.py on a Slurm cluster through submitit, with DeiT's arguments.

    python scripts/run_with_submitit.py --nodes 2 --ngpus 8 --job_dir jobs/%j [main.py arguments]

A job that is preempted or reaches its time limit is queued again and goes on where it stopped.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as training
from argument_parser import check_ranges
from errors import UserError


def get_args_parser() -> argparse.ArgumentParser:
    parser = training.get_args_parser()
    parser.prog = "run_with_submitit.py"
    add, _ = parser.in_group("Slurm job")
    add("--ngpus", default=8, type=int, within="[1, inf)", help="GPUs of each node")
    add("--nodes", default=2, type=int, within="[1, inf)", help="machines of the job")
    add("--timeout", default=2800, type=int, within="[1, inf)", help="minutes of the job")
    add("--job_dir", default="jobs/%j", metavar="FOLDER", help="logs and run; %%j: job number")
    add("--partition", default=None, otherwise="Slurm's", help="partition to ask for")
    add("--comment", default=None, help="comment of the job")
    return parser


class Job:
    """What every process of the job runs; submitit pickles it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self) -> None:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export()
        job = submitit.JobEnvironment().job_id
        self.args.output_dir = self.args.output_dir or self.args.job_dir.replace("%j", job)
        saved = Path(self.args.output_dir, "checkpoint.pth").exists()
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        if saved and requeued:  # whatever it was to begin with
            self.args.resume, self.args.overwrite = "auto", False
        elif not self.args.overwrite:
            self.args.resume = self.args.resume or "auto"
        # Of submitit's handlers, that of the signal before a time limit or preemption requeues.
        handlers = {128 + n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2)}
        try:
            training.main(self.args)
        except SystemExit as ended:
            if not callable(requeue := handlers.get(ended.code)):
                raise
            requeue(ended.code - 128, None)  # training has saved

    def checkpoint(self):
        """Called before preemption: the job queued again has the same number and folder."""
        import submitit

        return submitit.helpers.DelayedSubmission(Job(self.args))


def submit(args: argparse.Namespace):
    """Queues the job; returns submitit's handle of it."""
    try:
        import submitit

        check_ranges(get_args_parser(), args)
        training.check_args(args)
    except ModuleNotFoundError:
        print("run_with_submitit.py: error: run pip install submitit first.", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"run_with_submitit.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    optional = {"slurm_partition": args.partition, "slurm_comment": args.comment}
    executor = submitit.AutoExecutor(folder=args.job_dir, slurm_max_num_timeout=30)
    executor.update_parameters(
        name="lion",
        nodes=args.nodes,
        gpus_per_node=args.ngpus,
        tasks_per_node=args.ngpus,
        cpus_per_task=args.num_workers,
        timeout_min=args.timeout,
        slurm_signal_delay_s=120,
        **{name: value for name, value in optional.items() if value},
    )
    return executor.submit(Job(args))


if __name__ == "__main__":
    print("Submitted job", submit(get_args_parser().parse_args()).job_id)
