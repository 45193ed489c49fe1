#!/bin/sh
# Says in one line what this machine lacks to build the project. Argument: the Python to use.
python="$1"

fail() {
  echo "mambaquant_ext: $1" >&2
  exit 1
}

command -v "$python" >/dev/null 2>&1 ||
  fail "no $python found: install Python 3.10 or newer (Debian: apt install python3 python3-venv), or name one with make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version 2>&1) is too old: install Python 3.10 or newer, or name one with make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "this Python has no venv module: install it (Debian: apt install python3-venv)"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
  fail "this Python has no headers (Python.h): install them (Debian: apt install python3-dev)"

if [ -n "${CXX:-}" ]; then
  # CXX may carry arguments, as in "ccache g++".
  command -v "${CXX%% *}" >/dev/null 2>&1 || fail "CXX is '$CXX', and there is no such compiler"
else
  command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
    fail "no C++ compiler found: install one (Debian: apt install g++), or name it in the variable CXX"
fi
