#!/bin/sh
# What building for Windows and running that without Windows needs, on Debian and Ubuntu, as packages: mingw-w64's compilers
# and wine.
#
#   tests/integration/windows/prepare.sh FOLDER       (for the log of apt-get)
set -eu

PACKAGES="g++-mingw-w64-x86-64-posix wine wine64"

say() { echo "$@" >&2; }

fail() {
    say "error: $*"
    exit 1
}

[ $# -eq 1 ] || fail "usage: tests/integration/windows/prepare.sh FOLDER"
mkdir -p "$1"
if command -v x86_64-w64-mingw32-g++-posix >/dev/null && command -v wine >/dev/null; then
    exit 0
fi
command -v apt-get >/dev/null || fail "no apt-get here; install by hand: mingw-w64 with posix threads, and wine"
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif command -v sudo >/dev/null; then
    as_root="sudo"
else
    fail "not root and no sudo; as root: apt-get install $PACKAGES"
fi
say "== installing $PACKAGES"
install="$as_root apt-get install -y --no-install-recommends $PACKAGES"
# shellcheck disable=SC2086 # words of a command
DEBIAN_FRONTEND=noninteractive $install >"$1/apt.log" 2>&1 ||
    { $as_root apt-get update >>"$1/apt.log" 2>&1 && $install >>"$1/apt.log" 2>&1; } ||
    { tail -n 20 "$1/apt.log" >&2; fail "apt-get install $PACKAGES failed"; }
