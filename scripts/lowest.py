"""Prints the lowest versions that requirements files allow, for pip's constraints."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path


def lowest(lines: Iterable[str]) -> list[str]:
    """`name==version` for each requirement `name>=version` or `name~=version`."""
    found = (re.match(r"([\w-]+)(?:>=|~=)([\w.]+)", line) for line in lines)
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="requirements.txt")
    for file in parser.parse_args().files:
        print(*lowest(file.read_text(encoding="utf-8").splitlines()), sep="\n")
