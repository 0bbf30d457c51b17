"""Scores one checkpoint in every format: accuracy, time and peak memory as a table.

    python scripts/score_formats.py --resume checkpoint.pth [main.py arguments]

Each format runs `main.py --eval` in a process of its own.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

FORMATS = ("Attention", "RNN", "Chunk")
MAIN = Path(__file__).resolve().parent.parent / "main.py"
RESULTS = {
    "top-1 (%)": r"\* Acc@1 (\S+)",
    "time (s)": r"Evaluation took (\S+) s",
    "images/s": r"\((\S+) images/s\)",
    "peak memory (MiB)": r"peak memory (\S+) MiB",
}


def score(format: str, arguments: list[str]) -> list[str]:
    """The figures of `RESULTS`; leaves with main.py's message and exit code if it fails."""
    command = [sys.executable, str(MAIN), "--eval", *arguments, "--format", format]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return [re.search(pattern, done.stdout)[1] for pattern in RESULTS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--resume", required=True, metavar="CHECKPOINT", help="as of main.py")
    checkpoint, more = parser.parse_known_args()
    arguments = ["--resume", checkpoint.resume, *more]
    rows = [["format", *RESULTS], *([name, *score(name, arguments)] for name in FORMATS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
