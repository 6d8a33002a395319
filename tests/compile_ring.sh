#!/usr/bin/env bash
# Every GPU kernel that the problem lists and the benchmarks ask for, compiled with no GPU: warnings, slow compiles, spills
# and local memory fail, those beyond what known_spills.txt has of a kernel.
# Usage: compile_ring.sh FOVEA TABLE ARCH,... [options of `fovea precompile --check`]
set -euo pipefail
fovea=$1 table=$2 wanted=$3
shift 3
lists=()
here=$(dirname "${BASH_SOURCE[0]}")
for list in "$here"/problems/*.txt "$here"/../bench/{grid,beyond}.txt; do lists+=("@$list"); done

# Those of the architectures that this NVRTC knows.
archs=$("$fovea" doctor --json | python3 -c '
import json, sys
known = json.load(sys.stdin)["cuda"]["nvrtc_archs"]
print(",".join(arch for arch in sys.argv[1].split(",") if arch in known))' "$wanted")
if [[ -z $archs ]]; then
  echo "skipped: there is no NVRTC (fovea doctor says why)"
  exit 77
fi
FOVEA_JIT=on "$fovea" precompile "${lists[@]}" --arch "$archs" --check --table "$table" \
  --known-spills "$here/known_spills.txt" "$@"
