#!/usr/bin/env bash
# usage: install_test.sh SOURCE_DIR BUILD_DIR
# Installs Fovea, then builds and runs the examples against the installed tree as a user would: by find_package and by
# pkg-config, against the library as this build made it and against the other kind (static or shared).
set -euo pipefail
source_dir=$1 build_dir=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command -v pkg-config >/dev/null || { echo "no pkg-config here: skipped"; exit 77; }

fail() { echo "install_test: $*" >&2; exit 1; }

# use_installed PREFIX: both examples, both ways.
use_installed() {
  local prefix=$1 example language compiler
  local -x PKG_CONFIG_PATH
  PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name fovea.pc)")
  for example in cpp_minimal c_minimal; do
    cmake -S "$source_dir/examples/$example" -B "$work/$example" -G Ninja --fresh -DCMAKE_PREFIX_PATH="$prefix" >"$work/log" ||
      { cat "$work/log"; fail "find_package(fovea) failed for $example"; }
    cmake --build "$work/$example" >"$work/log" || { cat "$work/log"; fail "$example does not build"; }
    "$work/$example/$example" | tee "$work/out"
    grep -q 'on cpu: ' "$work/out" || fail "$example printed no report"
  done
  for language in c cpp; do
    compiler=cc example=$source_dir/examples/c_minimal/main.c
    [[ $language == c ]] || compiler="c++ -std=c++20" example=$source_dir/examples/cpp_minimal/main.cpp
    # shellcheck disable=SC2046,SC2086  # flags are words
    $compiler "$example" -o "$work/by_pkg_config" $(pkg-config --cflags --libs fovea)
    LD_LIBRARY_PATH=$(pkg-config --variable=libdir fovea) "$work/by_pkg_config" >"$work/out2"
    grep -q 'on cpu: ' "$work/out2" || fail "built by pkg-config, the $language example printed no report"
  done
  [[ $("$prefix/bin/fovea" --version) == *"$(pkg-config --modversion fovea)"* ]] || fail "fovea.pc and the command disagree on the version"
}

echo "== as built in $build_dir"
cmake --install "$build_dir" --prefix "$work/first" >/dev/null
use_installed "$work/first"
