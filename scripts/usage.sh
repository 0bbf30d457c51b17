# Source this with how many arguments are needed, how many there may be (empty: any number), and
# them: where they are fewer or more, or begin with an option, it ends with the script's head.

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

if [ "${3:-}" = -h ] || [ "${3:-}" = --help ]; then
    usage
    exit
elif [ $(($# - 2)) -lt "$1" ] || [ $(($# - 2)) -gt "${2:-$#}" ] || [[ "${3:-}" == -* ]]; then
    echo "error: $0 takes its arguments as follows." >&2
    usage >&2
    exit 2
fi
