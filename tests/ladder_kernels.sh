#!/usr/bin/env bash
# The ladder's kernels compiled with no GPU: spills, local memory and warnings fail.  Usage: ladder_kernels.sh FOVEA
set -euo pipefail
fovea=$1
if [[ $("$fovea" doctor --json) == *'"nvrtc": null'* ]]; then
  echo "skipped: there is no NVRTC (fovea doctor says why)"
  exit 77
fi
FOVEA_JIT=on "$fovea" precompile --ladder --arch sm_80,sm_90 --check
