#!/bin/sh
# Make the virtual environment in $1 with a Python of at least 3.11, or say what is missing and how to get it.
# PYTHON names the interpreter to use; without it the newest suitable one on PATH is taken, python3 first.
set -eu
folder=$1
wanted='import sys; sys.exit(sys.version_info < (3, 11))'

die() {
    echo "hvreplica: $1" >&2
    exit 1
}

suits() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c "$wanted" >/dev/null 2>&1
}

if [ -x "$folder/bin/python" ]; then
    suits "$folder/bin/python" || die "$folder has a Python older than 3.11; remove the folder and try again"
    python=$folder/bin/python
elif [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" || die "PYTHON=$PYTHON is absent or older than 3.11"
    python=$PYTHON
else
    python=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if suits "$name"; then
            python=$name
            break
        fi
    done
    [ -n "$python" ] || die "no Python of at least 3.11 on PATH; install one (Debian 12: apt-get install python3 \
python3-venv python3-dev) or name it with make PYTHON=/path/to/python3"
fi

headers='import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
"$python" -c "$headers" || die "$python has no header files to build the C extension with \
(Debian: apt-get install python3-dev; Fedora: dnf install python3-devel)"
if [ -n "${CC:-}" ]; then
    command -v "${CC%% *}" >/dev/null 2>&1 || die "CC=$CC is not a program"
fi
command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || [ -n "${CC:-}" ] || die "no C compiler \
(Debian: apt-get install gcc libc6-dev; Fedora: dnf install gcc)"

if [ ! -x "$folder/bin/python" ]; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python cannot make virtual environments \
(Debian: apt-get install python3-venv)"
    echo "making $folder with $("$python" --version)"
    "$python" -m venv "$folder"
fi
