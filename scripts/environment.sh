# Source this: it makes .venv in the repository root, or renews it when the requirements, Python or
# the folder have changed, and activates it. A .venv that is a link is used as it is: it is another's.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    echo "error: python3 must be Python 3.11 or newer: install one, or put it first on PATH." >&2
    return 2
fi

environment="$(python3 --version) in $repository with
$(cat "$repository/requirements.txt" "$repository/mlm/requirements.txt")"
if [ ! -L "$repository/.venv" ] &&
    [ "$environment" != "$(cat "$repository/.venv/installed" 2> /dev/null)" ]; then
    echo "Making the environment $repository/.venv: about 6 GB, a few minutes ..."
    if ! python3 -m venv --clear "$repository/.venv"; then
        echo "error: python3 cannot make an environment: install its venv module" \
            "(Debian and Ubuntu: apt install python3-venv)." >&2
        return 2
    fi
    "$repository/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --requirement "$repository/requirements.txt" \
        --requirement "$repository/mlm/requirements.txt" || return
    echo "$environment" > "$repository/.venv/installed"
    echo "The environment is ready."
fi
source "$repository/.venv/bin/activate"
