#!/bin/sh
# Chromium for the tests of the page, on Debian and Ubuntu: tests/support/install_chromium.sh
#
# Nothing is done where there is one already, or where STEERMOE_CHROMIUM names one.
set -eu

say() { echo "$@" >&2; }

[ -z "${STEERMOE_CHROMIUM:-}" ] || exit 0
for name in chromium-headless-shell chromium chromium-browser google-chrome-stable google-chrome; do
    ! command -v "$name" >/dev/null || exit 0
done

by_hand="install Chromium by hand, or name one in STEERMOE_CHROMIUM"
command -v apt-get >/dev/null || { say "error: no apt-get here; $by_hand"; exit 1; }
as_root=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { say "error: not root and no sudo; $by_hand"; exit 1; }
    as_root="sudo"
fi
say "== installing Chromium"
log=$(mktemp)

# The headless shell where there is one (Debian), else the whole browser.
install() {
    for package in chromium-headless-shell chromium; do
        DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y --no-install-recommends "$package" fonts-dejavu-core \
            >>"$log" 2>&1 && return
    done
    return 1
}

install || { $as_root apt-get update >>"$log" 2>&1 && install; } ||
    { tail -n 20 "$log" >&2; say "error: apt-get install failed; $by_hand"; exit 1; }
rm -f "$log"
