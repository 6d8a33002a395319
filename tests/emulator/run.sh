#!/usr/bin/env bash
# Runs the command on an emulated GPU.  Usage: run.sh FOVEA FOLDER_OF_THE_EMULATOR CACHE ARCH ARGUMENTS...
# EMULATOR_SEED draws other lots, EMULATOR_SMS says how many blocks run at once (132).
set -euo pipefail
fovea=$1 emulator=$2 cache=$3 arch=$4
shift 4
nvrtc=$("$fovea" doctor --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["cuda"]["nvrtc_path"] or "")')
if [[ -z $nvrtc ]]; then
  echo "skipped: there is no NVRTC (fovea doctor says why)"
  exit 77
fi
export EMULATOR_NVRTC=$nvrtc EMULATOR_ARCH=${arch#sm_}
export FOVEA_NVRTC=$emulator/libnvrtc.so FOVEA_CACHE_DIR=$cache FOVEA_JIT=on LD_LIBRARY_PATH=$emulator
exec "$fovea" "$@"
