#!/bin/sh
# What a cross-build for 64-bit ARM Linux and running it need, on Debian:
#
#   tests/integration/arm64/prepare.sh compiler
#   tests/integration/arm64/prepare.sh python FOLDER
#
# `compiler` installs the cross-compiler. `python` unpacks into FOLDER a qemu for programs of that processor and Debian's
# Python for it, and writes FOLDER/venv, whose bin/python runs the one under the other. Nothing of `python` is installed,
# and the machine's own packages, architectures and binary formats stay as they are: root is not needed.
set -eu

PYTHON="python3 libstdc++6"

say() { echo "$@" >&2; }

fail() {
    say "error: $*"
    exit 1
}

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    fail "no apt-get here; tests on 64-bit ARM are prepared on Debian alone (in a container, or on an ARM machine: make test)"

install_compiler() {
    command -v aarch64-linux-gnu-g++ >/dev/null ||
        sh "$(dirname "$0")/../../support/install_packages.sh" g++-aarch64-linux-gnu
}

# Unpacks packages of an architecture, and with `install` what they depend on, into a folder: by apt with files of its own,
# from the mirrors that this machine installs from. Of the packages only PATHS (`.`: all).
unpack() { # ARCHITECTURE TARGET PATHS install|download PACKAGE...
    architecture=$1 target=$2 paths=$3 how=$4
    shift 4
    apt=$target.apt
    rm -rf "$apt" "$target"
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$target"
    : >"$apt/state/status"
    cat >"$apt/apt.conf" <<-END
		APT::Architecture "$architecture";
		APT::Architectures { "$architecture"; };
		APT::Install-Recommends "false";
		APT::Sandbox::User "root";
		Acquire::Languages "none";
		Debug::NoLocking "true";
		Dir::State "$apt/state";
		Dir::State::status "$apt/state/status";
		Dir::Cache "$apt/cache";
	END
    log=$apt/apt.log
    (
        APT_CONFIG=$apt/apt.conf && export APT_CONFIG
        cd "$apt/cache/archives"
        apt-get update
        case $how in
        install) apt-get -y --download-only install "$@" ;;
        *) apt-get download "$@" ;;
        esac
    ) >"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "$* for $architecture cannot be had from this machine's mirrors"; }
    for package in "$apt"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$target" "$paths"
    done
    rm -rf "$apt"
}

write_program() { # PATH WORDS
    printf '#!/bin/sh\nexec %s "$@"\n' "$2" >"$1"
    chmod +x "$1"
}

unpack_python() {
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    say "== unpacking qemu and Debian's Python for 64-bit ARM into $folder"
    unpack "$(dpkg --print-architecture)" "$folder/qemu" ./usr/bin/qemu-aarch64-static download qemu-user-static
    # shellcheck disable=SC2086 # words
    unpack arm64 "$folder/root" . install $PYTHON
    version=$(readlink "$folder/root/usr/bin/python3")
    [ -x "$folder/root/usr/bin/$version" ] || fail "no Python in $folder/root"

    # Python takes its own path, and with it the folder of pyvenv.cfg, from its first argument: that of the script, which
    # also its child processes start. QEMU_CPU names the processor.
    rm -rf "$folder/venv"
    mkdir -p "$folder/venv/bin" "$folder/venv/lib/$version/site-packages"
    printf 'home = %s\ninclude-system-site-packages = false\n' "$folder/root/usr/bin" >"$folder/venv/pyvenv.cfg"
    qemu="'$folder/qemu/usr/bin/qemu-aarch64-static' -L '$folder/root'"
    write_program "$folder/venv/bin/python" "$qemu -0 \"\$0\" '$folder/root/usr/bin/$version'"
    # shellcheck disable=SC2016 # for the program
    write_program "$folder/venv/bin/steermoe" '"$(dirname "$0")/python" -P -m steermoe_local'
    ln -sfn "lib/$version/site-packages" "$folder/venv/packages"
    "$folder/venv/bin/python" -c 'import platform; assert platform.machine() == "aarch64", platform.machine()' ||
        fail "the Python for 64-bit ARM does not run"
}

case "${1:-}-$#" in
compiler-1) install_compiler ;;
python-2) unpack_python "$2" ;;
*) fail "usage: tests/integration/arm64/prepare.sh compiler | python FOLDER" ;;
esac
