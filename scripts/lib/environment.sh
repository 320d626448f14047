# The virtual environment of this checkout: found, made or brought up to date in one place. Sourced by scripts/*.
#
#   ensure_environment base|test|dev     afterwards "$VENV/bin/python" has the package and what the level needs
#
# A level includes those before it. When the level's stamp still equals the project's requirements nothing is run, so a
# second start costs a few milliseconds. Starts at the same time wait for each other. Runs under bash 3.2 and later.
#
#   TOKENMILL_PYTHON       the Python to make the environment with (3.11 or later)
#   TOKENMILL_TORCH_INDEX  an additional package index to look for torch builds in, for example one with CPU builds
#
# pip's own configuration (files and PIP_* variables) is used as it stands.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
VENV="$ROOT/.venv"

say() { printf 'tokenmill: %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# What an installed level was made from. The path is part of it because an editable install holds absolute paths.
requirements_text() {
  printf 'checkout %s\n' "$ROOT"
  cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"
}

# Succeeds when the environment has level $1 and its requirements have not changed since.
is_current() {
  [ -x "$VENV/bin/python" ] && [ -f "$VENV/stamp-$1" ] && requirements_text | cmp -s - "$VENV/stamp-$1"
}

# Prints a Python that can make the environment, or explains what is missing.
find_python() {
  local candidate
  for candidate in ${TOKENMILL_PYTHON:+"$TOKENMILL_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python 3.11 or later with the venv module was found. Install one (on Debian and Ubuntu: the packages" \
    "python3 and python3-venv), or name it: TOKENMILL_PYTHON=/path/to/python3 $0"
}

# Runs a command, its output in the log; on a terminal its latest line is shown in place. On failure the log's end is.
with_progress() {
  local log="$VENV/install.log" line width status=0
  if [ -t 2 ]; then
    width=$(($(tput cols 2>/dev/null || echo 80) - 4))
    "$@" 2>&1 | tee -a "$log" | while IFS= read -r line; do
      printf '\r\033[K  %s' "${line:0:$width}" >&2
    done || status=$?
    printf '\r\033[K' >&2
  else
    "$@" >>"$log" 2>&1 || status=$?
  fi
  [ "$status" -ne 0 ] || return 0
  tail -n 25 "$log" >&2
  die "the installation failed; the lines above are the end of $log"
}

make_venv() {
  find "$VENV" -mindepth 1 -maxdepth 1 ! -name lock -exec rm -rf {} +
  say "making the virtual environment .venv ($("$1" --version))"
  with_progress "$1" -m venv "$VENV"
}

install_level() {
  local level="$1" target="$ROOT" index=()
  [ "$level" = base ] || target="$ROOT[$level]"
  [ -z "${TOKENMILL_TORCH_INDEX:-}" ] || index=(--extra-index-url "$TOKENMILL_TORCH_INDEX")
  say "installing the package and its dependencies (once; some minutes on a slow network)"
  if [ "$(uname -s)" = Linux ] && [ -z "${TOKENMILL_TORCH_INDEX:-}" ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    say "no NVIDIA GPU here: TOKENMILL_TORCH_INDEX can name an index of smaller CPU builds of torch (CONTRIBUTING.md)"
  fi
  with_progress "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input \
    -c "$ROOT/constraints.txt" ${index[@]+"${index[@]}"} -e "$target"
}

stamp_level() {
  local level
  for level in base test dev; do
    requirements_text >"$VENV/stamp-$level"
    [ "$level" != "$1" ] || break
  done
}

ensure_environment() {
  local level="$1" python
  is_current "$level" && return
  python="$(find_python)" || exit 1
  mkdir -p "$VENV"
  exec 9>"$VENV/lock"
  # The lock belongs to descriptor 9 of this shell, so it outlives the Python that takes it.
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! is_current "$level"; then # another start may have done it while this one waited
    # An environment of another checkout (copied or moved here) or without pip is made anew, any other is updated.
    if ! head -n 1 "$VENV/made-for" 2>/dev/null | grep -qxF "$ROOT" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
      make_venv "$python"
      printf '%s\n' "$ROOT" >"$VENV/made-for"
    fi
    requirements_text | cmp -s - "$VENV/stamp-base" || rm -f "$VENV"/stamp-*
    install_level "$level"
    stamp_level "$level"
  fi
  exec 9>&-
}
