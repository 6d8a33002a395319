#!/usr/bin/env bash
# usage: check.sh FOLDER [COUNT]
# Builds the portable CPU kernels, the oracle and `check` for AArch64 into FOLDER and checks COUNT random problems under
# QEMU.  No AArch64 build of TBB is at hand, so one thread does all the work (serial_threads.cpp).
set -euo pipefail
folder=$1 count=${2:-60}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$folder/headers"
ln -sfn /usr/include/fmt "$folder/headers/fmt"  # this machine's, but used as headers alone
files=$(cd src && find math cuda -name '*.cuh' -o -name 'spec.h' -o -name 'params.h' -o -path 'math/*.h' | sort | paste -sd ';')
cmake "-DFILES=$files" -DROOT=src -DOUTPUT="$folder/device_text.cpp" -P cmake/embed_device_text.cmake
compile() {
  aarch64-linux-gnu-g++ -std=c++20 -O2 -ffp-contract=fast -DFOVEA_ISA=portable -DFMT_HEADER_ONLY \
    -Iinclude -Isrc -Itools -I"$1/headers" -c "$2" -o "$1/${2//\//_}.o"
}
export -f compile
{
  find src \( -path src/nn -o -path src/files \) -prune -o -name '*.cpp' ! -name threads.cpp -print
  echo "$folder/device_text.cpp"
  printf 'tools/%s.cpp\n' check device_call error_rule plain random_problem roundings terminal workload
  find tests/cross -name '*.cpp'
} | xargs -P "$(nproc)" -I{} bash -c "compile '$folder' '{}'"
aarch64-linux-gnu-g++ -static -o "$folder/check" "$folder"/*.o
qemu-aarch64 "$folder/check" "$count"
