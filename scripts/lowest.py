"""Prints the lowest versions that requirements files allow, for pip's constraints."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path


def lowest(lines: Iterable[str]) -> list[str]:
    """`name==version` for each requirement `name>=version` or `name~=version`."""
    found = (re.match(r"([\w-]+)(?:>=|~=)([\w.]+)", line) for line in lines)
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*lowest(Path(name).read_text(encoding="utf-8").splitlines()), sep="\n")
