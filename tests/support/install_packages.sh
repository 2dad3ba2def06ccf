#!/bin/sh
# Installs packages of Debian or Ubuntu that are not there yet, as root or by sudo: tests/support/install_packages.sh PACKAGE...
#
# Says what it installs; what apt-get writes is shown only if it fails.
set -eu

fail() {
    echo "error: $*" >&2
    exit 1
}

missing=""
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null || fail "no apt-get here; install by hand what Debian calls$missing"
as_root="env DEBIAN_FRONTEND=noninteractive"
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "not root and no sudo; as root: apt-get install$missing"
    as_root="sudo $as_root" # sudo keeps no variables
fi
echo "== installing$missing" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install="$as_root apt-get install -y --no-install-recommends$missing"
# A new machine has no lists of packages, or old ones.
$install >"$log" 2>&1 || { $as_root apt-get update >>"$log" 2>&1 && $install >>"$log" 2>&1; } ||
    { tail -n 20 "$log" >&2; fail "apt-get install$missing failed"; }
