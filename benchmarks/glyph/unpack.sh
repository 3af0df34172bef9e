#!/bin/sh
# Fetch the font packages of packages.txt with apt and unpack them under $1, without installing them.
# Writes $1/fonts.list: lines "package path".
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/debs" && cd "$1"
(cd debs && apt-get download $(cat "$here/packages.txt"))
: > fonts.list
for deb in debs/*.deb; do
    dpkg-deb -x "$deb" .
    name=$(dpkg-deb -f "$deb" Package)
    dpkg-deb -c "$deb" | grep -v ' -> ' | sed -n 's|^-.* \./\(.*\.[to]tf\)$|\1|Ip' | sed "s|^|$name |" >> fonts.list
done
