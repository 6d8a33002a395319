#!/usr/bin/env bash
# usage: check.sh FOLDER [COUNT]
# Builds the portable CPU kernels, the oracle and `check` for AArch64 into FOLDER and checks COUNT random problems under
# QEMU.  No AArch64 build of TBB is at hand, so one thread does all the work (serial_threads.cpp).
set -euo pipefail
folder=$1 count=${2:-60}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$folder/headers"
ln -sfn /usr/include/fmt "$folder/headers/fmt"  # this machine's, but used as headers alone
compile() {
  aarch64-linux-gnu-g++ -std=c++20 -O2 -ffp-contract=fast -DFOVEA_ISA=portable -DFMT_HEADER_ONLY \
    -Iinclude -Isrc -Itools -I"$1/headers" -c "$2" -o "$1/${2//\//_}.o"
}
export -f compile
{
  find src/api src/cpu src/dispatch src/problem -name '*.cpp' ! -name threads.cpp
  printf 'tools/%s.cpp\n' check error_rule plain random_problem roundings terminal workload
  find tests/cross -name '*.cpp'
} | xargs -P "$(nproc)" -I{} bash -c "compile '$folder' '{}'"
aarch64-linux-gnu-g++ -static -o "$folder/check" "$folder"/*.o
qemu-aarch64 "$folder/check" "$count"
