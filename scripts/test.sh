#!/usr/bin/env bash
# Checks the style and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

ruff check
ruff format --check
mypy
python -m pytest --numprocesses 2 --dist worksteal "$@"
