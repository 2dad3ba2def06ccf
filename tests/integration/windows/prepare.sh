#!/bin/sh
# What building for Windows and running that without Windows needs, on Debian and Ubuntu, as packages: mingw-w64's compilers
# and wine.
set -eu

packages=""
command -v x86_64-w64-mingw32-g++-posix >/dev/null || packages="g++-mingw-w64-x86-64-posix"
command -v wine >/dev/null || packages="$packages wine wine64"
# shellcheck disable=SC2086 # words
[ -z "$packages" ] || sh "$(dirname "$0")/../../support/install_packages.sh" $packages
