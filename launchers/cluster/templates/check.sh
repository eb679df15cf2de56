# shellcheck shell=sh
# Check on each node that it can access the folder, and Python with this software; then run the given command, if any.
# Reads FOLDER, PYTHON, SOFTWARE (where it is submitted from) and WRONG (exit status for a mistake of the user).
refuse() { echo "error: $(hostname): $1"; exit "$WRONG"; }
test -d "$FOLDER" || refuse "$FOLDER: got no such folder, expected one that every node sees. Use a shared one"
command -v "$PYTHON" >/dev/null || refuse "$PYTHON: got no such command, expected Python. Set python or setup"
"$PYTHON" -c "import launchers" || refuse "$PYTHON: got no package launchers, expected to see $SOFTWARE"
[ $# -eq 0 ] || exec "$@"
