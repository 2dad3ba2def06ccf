#!/bin/sh
# Chromium for the tests of the page, on Debian and Ubuntu: tests/support/install_chromium.sh
#
# Nothing is done where there is one already, or where STEERMOE_CHROMIUM names one.
set -eu

[ -z "${STEERMOE_CHROMIUM:-}" ] || exit 0
for name in chromium-headless-shell chromium chromium-browser google-chrome-stable google-chrome; do
    ! command -v "$name" >/dev/null || exit 0
done

install=$(dirname "$0")/install_packages.sh
# The headless shell where there is one (Debian), else the whole browser.
sh "$install" chromium-headless-shell fonts-dejavu-core 2>/dev/null || sh "$install" chromium fonts-dejavu-core || {
    echo "error: no Chromium; install one by hand, or name one in STEERMOE_CHROMIUM" >&2
    exit 1
}
