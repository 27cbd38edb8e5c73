#!/bin/sh
# CairoSVG loads libcairo at run time. Install it where that is possible; otherwise say what to install.
set -eu
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "fmsuite needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 1
}
has_cairo() { "$PYTHON" -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("cairo") is None)'; }
has_cairo && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libcairo2 >/dev/null
fi
has_cairo || echo "libcairo2 is missing: the svg domain needs it (Debian: apt-get install libcairo2; macOS: brew install cairo)." >&2
