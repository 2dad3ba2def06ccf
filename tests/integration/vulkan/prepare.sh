#!/bin/sh
# What building llama.cpp with Vulkan and running it without a GPU needs, on Debian and Ubuntu:
#
#   tests/integration/vulkan/prepare.sh FOLDER
#
# installs Mesa's drivers (lavapipe computes on the CPU), the Vulkan loader's library, the shader compiler and the SPIR-V
# headers, and prints the options for CMake on stdout. Where the installed Vulkan headers are older than the tree wants
# (Debian 12), newer ones are unpacked into FOLDER, beside the system's, which stay as they are.
set -eu

NEWER_SUITE=trixie # Debian 13: Vulkan headers 1.4.309

say() { echo "$@" >&2; }

fail() {
    say "error: $*"
    exit 1
}

[ $# -eq 1 ] || fail "usage: tests/integration/vulkan/prepare.sh FOLDER"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
command -v apt-get >/dev/null ||
    fail "no apt-get here; install by hand: the Vulkan loader and headers (1.4 or newer), glslc, SPIR-V headers, lavapipe"
sh "$(dirname "$0")/../../support/install_packages.sh" mesa-vulkan-drivers libvulkan-dev glslc spirv-headers

# ggml-vulkan.cpp uses this type
new_enough() { grep -qs "struct LayerSettingEXT" "$1/vulkan/vulkan_structs.hpp"; }

if new_enough /usr/include; then
    exit 0
fi

headers=$folder/headers/usr/include
if ! new_enough "$headers"; then
    say "== the installed Vulkan headers are too old; unpacking those of Debian $NEWER_SUITE into $folder/headers"
    # The mirror that this machine installs from, with another suite, and apt's files all in a folder of their own.
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' "Codename: $codename" 'Component: main' | head -n 1)
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e "$keyring" ] || fail "$keyring is missing; apt-get install debian-archive-keyring"
    case "$(. /etc/os-release && echo "${ID:-}") $mirror" in
    "debian "?*) ;;
    *) fail "Vulkan headers 1.4 or newer are needed and this is no Debian with a mirror (try apt-get update);" \
        "install them by hand and pass -DVulkan_INCLUDE_DIR=... in CMAKE_ARGS" ;;
    esac
    apt=$folder/apt
    rm -rf "$apt" "$folder/headers"
    mkdir -p "$apt/etc/apt.conf.d" "$apt/etc/preferences.d" "$apt/etc/sources.list.d" \
        "$apt/state/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/state/status"
    echo "deb [signed-by=$keyring] $mirror $NEWER_SUITE main" >"$apt/etc/sources.list"
    cat >"$apt/apt.conf" <<-END
		Dir::Etc "$apt/etc";
		Dir::State "$apt/state";
		Dir::State::status "$apt/state/status";
		Dir::Cache "$apt/cache";
		Acquire::Languages "none";
		APT::Sandbox::User "root";
	END
    (cd "$apt" && APT_CONFIG=$apt/apt.conf && export APT_CONFIG &&
        apt-get update && apt-get download libvulkan-dev) >"$folder/headers.log" 2>&1 ||
        { tail -n 20 "$folder/headers.log" >&2; fail "libvulkan-dev of $NEWER_SUITE cannot be had from this machine's mirror"; }
    dpkg-deb -x "$apt"/libvulkan-dev_*.deb "$folder/headers"
    rm -rf "$apt"
    new_enough "$headers" || fail "libvulkan-dev of $NEWER_SUITE has no vk::LayerSettingEXT; the package changed"
fi
echo "-DVulkan_INCLUDE_DIR=$headers"
