#!/bin/sh
# The Chromium of Debian for the tests of the pages: `make chromium`. A browser that is there already is taken.
set -eu
for name in chromium chromium-browser google-chrome chrome; do
    if command -v "$name"; then
        exit 0
    fi
done
if [ "$(id -u)" != 0 ]; then
    echo "error: user: got $(id -un), expected root: a package is installed. Call: sudo make chromium" >&2
    exit 2
fi
if ! command -v apt-get >/dev/null; then
    echo "error: apt-get: got nothing, expected Debian. Install Chromium or Chrome yourself" >&2
    exit 2
fi
apt-get -q update
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium
