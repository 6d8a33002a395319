#!/usr/bin/env bash
# Every GPU kernel that the problem lists ask for, compiled with no GPU: spills, local memory, warnings and slow compiles
# fail.  Usage: compile_ring.sh FOVEA TABLE [options of `fovea precompile --check`]
set -euo pipefail
fovea=$1 table=$2
shift 2
lists=()
for list in "$(dirname "${BASH_SOURCE[0]}")"/problems/*.txt; do lists+=("@$list"); done

# The architectures that this NVRTC knows, out of those whose kernels differ.
archs=$("$fovea" doctor --json | python3 -c '
import json, sys
known = json.load(sys.stdin)["cuda"]["nvrtc_archs"]
print(",".join(arch for arch in ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120") if arch in known))')
if [[ -z $archs ]]; then
  echo "skipped: there is no NVRTC (fovea doctor says why)"
  exit 77
fi
FOVEA_JIT=on "$fovea" precompile "${lists[@]}" --arch "$archs" --check --table "$table" "$@"
