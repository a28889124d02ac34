#!/bin/sh
# Sets up 64-bit ARM under emulation, so that bundles for it can be proven on another machine:
#
#     sudo tests/arm/set_up.sh ~/.cache/arriero-arm64
#     export ARRIERO_ARM64=~/.cache/arriero-arm64
#
# Needs Debian 12 or a relative of it, the network, about 700 MB of disk, and root only where packages are missing
# (qemu-user-static, debootstrap, the cross compiler). Afterwards the folder holds `rootfs`, a Debian with Python that
# qemu runs, and `site`, the runtime's packages as a device has them. Nothing is done for what is already there.
set -eu

cache=${1:?"usage: $0 FOLDER"}
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9  # another run may be making the same folder

missing=""
for tool in qemu-aarch64-static:qemu-user-static debootstrap:debootstrap aarch64-linux-gnu-g++:g++-aarch64-linux-gnu; do
    command -v "${tool%%:*}" >/dev/null || PATH="$PATH:/usr/sbin" command -v "${tool%%:*}" >/dev/null || missing="$missing ${tool##*:}"
done
if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] || { echo "needs, from apt:$missing (run this as root to have them installed)" >&2; exit 3; }
    apt-get update -q
    # shellcheck disable=SC2086  # several words
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing
fi

if [ ! -e "$cache/rootfs.ready" ]; then
    rm -rf "$cache/rootfs"
    packages=python3-minimal,libpython3-stdlib,libstdc++6,zlib1g,libgomp1
    # only fetched and unpacked: nothing of it ever runs outside qemu, so the second stage is not needed
    PATH="$PATH:/usr/sbin" debootstrap --foreign --arch=arm64 --variant=minbase --include="$packages" bookworm "$cache/rootfs"
    for package in "$cache"/rootfs/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$cache/rootfs"; done
    touch "$cache/rootfs.ready"
fi

wanted=$("$python" - "$here/pyproject.toml" <<'LIST'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["tvm"]]))
LIST
)
if [ ! -e "$cache/site.ready" ] || [ "$(cat "$cache/site.ready")" != "$wanted" ]; then
    rm -rf "$cache/site"
    # Python of the rootfs is Debian 12's 3.11
    echo "$wanted" >"$cache/wanted.txt"
    "$python" -m pip install --quiet --target "$cache/site" --only-binary=:all: --python-version 3.11 \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --requirement "$cache/wanted.txt"
    echo "$wanted" >"$cache/site.ready"
fi
echo "ready: export ARRIERO_ARM64=$cache"
