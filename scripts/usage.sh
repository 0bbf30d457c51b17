# Source this with how many arguments are needed, and them: where they are fewer, or begin with an
# option, it ends with the script's head as its usage.

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

if [ "${2:-}" = -h ] || [ "${2:-}" = --help ]; then
    usage
    exit
elif [ $(($# - 1)) -lt "$1" ] || [[ "${2:-}" == -* ]]; then
    echo "error: $0 takes its arguments as follows." >&2
    usage >&2
    exit 2
fi
