#!/usr/bin/env bash
# Kills runs at random moments, starts them again, and compares them with runs left alone.
#   bash scripts/soak.sh [--kills N] [--seed N] [--output FOLDER] [CASE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
exec python scripts/soak.py "$@"
