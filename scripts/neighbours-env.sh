#!/usr/bin/env bash
# scripts/neighbours-env.sh FOLDER: a virtual environment with the libraries of the extra
# `neighbours` and this checkout. Where the folder is complete already, nothing is done.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: scripts/neighbours-env.sh FOLDER}
python=$folder/bin/python
ready=$folder/.installed

# Complete: these pins and this checkout were installed to the end.
wanted="$(cat "$root/constraints.txt" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1) $root"
if [ -x "$python" ] && [ "$(cat "$ready" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
rm -f "$ready"
rm -rf "$folder"/lib/python*/site-packages/optimum/quanto/library/extensions/cpp/build
test -x "$python" || "${PYTHON:-python3}" -m venv "$folder"
install() {
    "$python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" "$@"
}
# DeepSpeed's build imports torch; its kernels are compiled when they are used.
install torch setuptools wheel ninja hatchling editables
export DS_BUILD_OPS=0
install --no-build-isolation --editable "$root[train,neighbours]" pytest
"$python" -m pip check
# Quanto compiles its own at the first use, and waits for ever if that was once broken off.
"$python" -c 'from optimum.quanto.library.extensions.cpp import ext; ext.lib' >/dev/null
echo "$wanted" >"$ready"
