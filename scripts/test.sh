#!/usr/bin/env bash
# Checks the style and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

ruff check
ruff format --check
[ -n "${PIP_CONSTRAINT:-}" ] || mypy # the lowest versions of libraries declare other types
python -m pytest --numprocesses 2 --dist worksteal "$@"
