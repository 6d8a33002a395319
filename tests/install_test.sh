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

# by_find_package PREFIX SOURCE NAME: builds and runs the example NAME.
by_find_package() {
  local prefix=$1 source=$2 name=$3
  cmake -S "$source" -B "$work/$name" -G Ninja --fresh -DCMAKE_PREFIX_PATH="$prefix" >"$work/log" ||
    { cat "$work/log"; fail "find_package(fovea) failed for $source"; }
  cmake --build "$work/$name" >"$work/log" || { cat "$work/log"; fail "$source does not build"; }
  "$work/$name/$name" | tee "$work/out"
  grep -q 'on cpu: ' "$work/out" || fail "$source printed no report"
}

# use_layers: a program of the layers, by pkg-config.
use_layers() {
  cat >"$work/layers.cpp" <<'CPP'
#include <fovea/nn/nn.h>
#include <array>

int main() {
  std::array<float, 2 * 9 * 32> values{};
  const fovea::nn::MultiheadAttention attention({.embed_dim = 32, .num_heads = 4, .batch_first = true});
  const auto x = fovea::Tensor::contiguous(values.data(), fovea::DType::kFloat32, {2, 9, 32});
  return attention.forward(x, x, x).out.view().shape[1] == 9 ? 0 : 1;
}
CPP
  # shellcheck disable=SC2046  # flags are words
  c++ -std=c++20 "$work/layers.cpp" -o "$work/layers" $(pkg-config --cflags --libs fovea-nn)
  LD_LIBRARY_PATH=$(pkg-config --variable=libdir fovea-nn) "$work/layers" || fail "built by pkg-config, the layers do not run"
}

# use_formula [OBJECT...]: two rows, of which the second is NaN; with these objects in place of the library's.
use_formula() {
  cat >"$work/formula.cpp" <<'CPP'
#include <fovea/fovea.h>
#include <cmath>

int main() {
  float q[2] = {1.0F, NAN}, kv[2] = {0.0F, -0.5F}, out[2] = {}, lse[2] = {};
  const auto rows = [](float* data) { return fovea::Tensor::contiguous(data, fovea::DType::kFloat32, {1, 2, 1, 1}); };
  fovea::AttentionOptions options;
  options.backend = "cpu_portable";
  fovea::attention_forward(rows(q), rows(kv), rows(kv), options, rows(out),
                           fovea::Tensor::contiguous(lse, fovea::DType::kFloat32, {1, 1, 2}));
  return std::isnan(out[1]) && std::abs(lse[0] - std::log1p(std::exp(-0.5F))) < 1e-6F ? 0 : 1;
}
CPP
  # shellcheck disable=SC2046  # flags are words
  c++ -std=c++20 "$work/formula.cpp" "$@" -o "$work/formula" $(pkg-config --cflags --libs fovea)
  LD_LIBRARY_PATH=$(pkg-config --variable=libdir fovea) "$work/formula" || fail "the formula's result is wrong, or its NaN is lost"
}

# use_installed PREFIX: both examples, both ways.
use_installed() {
  local prefix=$1 example language compiler layers version
  local -x PKG_CONFIG_PATH
  PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name fovea.pc)")
  for example in cpp_minimal c_minimal; do
    by_find_package "$prefix" "$source_dir/examples/$example" "$example"
  done
  mkdir -p "$work/c_and_cpp"  # that example asks for no C++ compiler; a project that has one may link by it
  cp "$source_dir/examples/c_minimal/main.c" "$work/c_and_cpp"
  sed 's/LANGUAGES C)/LANGUAGES C CXX)/' "$source_dir/examples/c_minimal/CMakeLists.txt" >"$work/c_and_cpp/CMakeLists.txt"
  by_find_package "$prefix" "$work/c_and_cpp" c_minimal
  if [[ -n $(find "$prefix" -name libfovea.so) ]]; then
    # What find_package takes for another interface, the loader does, too.
    version=$(pkg-config --modversion fovea)
    [[ -e $PKG_CONFIG_PATH/../libfovea.so.${version%.*} ]] || fail "the soname is not that of versions ${version%.*}"
    layers=$(find "$prefix" -name libfovea_nn.so)
    [[ -z $layers || $(ldd "$layers") != *'libfovea.so'*'not found'* ]] || fail "libfovea_nn does not find libfovea beside it"
  fi
  # A user's warnings are errors, and pkg-config's headers are no system headers.
  # shellcheck disable=SC2046
  (cd "$prefix/include" && find fovea -name '*.h' -printf '#include <%p>\n') |
    c++ -std=c++20 -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Werror -fsyntax-only -x c++ \
      $(pkg-config --cflags fovea) - || fail "the headers are not free of warnings"
  for language in c cpp; do
    compiler=cc example=$source_dir/examples/c_minimal/main.c
    [[ $language == c ]] || compiler="c++ -std=c++20" example=$source_dir/examples/cpp_minimal/main.cpp
    # shellcheck disable=SC2046,SC2086  # flags are words
    $compiler "$example" -o "$work/by_pkg_config" $(pkg-config --cflags --libs fovea)
    LD_LIBRARY_PATH=$(pkg-config --variable=libdir fovea) "$work/by_pkg_config" >"$work/out2"
    grep -q 'on cpu: ' "$work/out2" || fail "built by pkg-config, the $language example printed no report"
  done
  use_formula
  if [[ -z $(find "$prefix" -name libfovea.so) ]]; then
    use_formula "$(find "$work/parent_build" -path '*/fovea_flash_portable.dir/*' -name 'flash.cpp.o')"
  fi
  [[ -e $PKG_CONFIG_PATH/fovea-nn.pc || -z $(find "$prefix" -name 'libfovea_nn.*') ]] || fail "there is no fovea-nn.pc"
  [[ ! -e $PKG_CONFIG_PATH/fovea-nn.pc ]] || use_layers
}

echo "== as a part of another project: the library alone, whose tests and command are nobody's there"
mkdir "$work/parent"
cp "$source_dir/examples/cpp_minimal/main.cpp" "$work/parent"
sed "s,find_package(fovea.*,add_subdirectory(\"$source_dir\" fovea)," "$source_dir/examples/cpp_minimal/CMakeLists.txt" \
  >"$work/parent/CMakeLists.txt"
cmake -S "$work/parent" -B "$work/parent_build" -G Ninja -DCMAKE_UNITY_BUILD=ON -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS_DEBUG='-O0 -Wshadow -Wconversion -Werror -ffast-math' >"$work/log" || { cat "$work/log"; fail "add_subdirectory failed"; }
cmake --build "$work/parent_build" --target help >"$work/log"
grep -q '^fovea: ' "$work/log" || fail "add_subdirectory makes no library"
! grep -E '^fovea_(tests|command): |^test: ' "$work/log" || fail "add_subdirectory makes more than the library"
! grep -q 'fovea_objects.dir/Unity' "$work/parent_build/build.ninja" || fail "another project's unity build merges the library's files"
cmake --build "$work/parent_build" --target fovea_flash_portable >"$work/log" ||
  { cat "$work/log"; fail "warnings that are errors in the other project are errors in the library"; }
cmake -S "$work/parent" -B "$work/bare_build" -G Ninja -DCMAKE_DISABLE_FIND_PACKAGE_fmt=ON >"$work/log" ||
  { cat "$work/log"; fail "attention alone asks for fmt, which only layers and command use"; }
cmake --build "$work/bare_build" --target help >"$work/log"
grep -q '^fovea: ' "$work/log" || fail "without fmt add_subdirectory makes no library"
! grep '^fovea_nn: ' "$work/log" || fail "without fmt there are layers that cannot be built"

echo "== in folders of its own, beside the prefix"
cmake -S "$source_dir" -B "$work/absolute" -G Ninja -DBUILD_TESTING=OFF -DCMAKE_INSTALL_LIBDIR="$work/a/lib" \
  -DCMAKE_INSTALL_INCLUDEDIR="$work/b/include" >"$work/log" || { cat "$work/log"; fail "absolute folders are refused"; }
for folder in libdir=a/lib includedir=b/include; do
  [[ $(pkg-config --variable="${folder%=*}" "$work/absolute/fovea.pc") == "$work/${folder#*=}" ]] ||
    fail "fovea.pc does not say where an absolute ${folder%=*} is"
done

echo "== as built in $build_dir"
cmake --install "$build_dir" --prefix "$work/built" >/dev/null
use_installed "$work/built"
[[ $("$work/built/bin/fovea" --version) == *"$(sed -n "s,^Version: ,,p" "$(find "$work/built" -name fovea.pc)")"* ]] ||
  fail "fovea.pc and the command disagree on the version"

echo "== whatever a packager's flags are, no number is computed by -ffast-math, as one file has shown that was compiled so"
cmake -S "$source_dir" -B "$work/fast" -G Ninja -DBUILD_TESTING=OFF -DCMAKE_CXX_FLAGS=-ffast-math \
  -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >"$work/log" || { cat "$work/log"; fail "configuring with -ffast-math failed"; }
grep -q -e '-ffast-math ' "$work/fast/compile_commands.json" || fail "a packager's flags are ignored"
! grep '"command"' "$work/fast/compile_commands.json" | grep "$source_dir/src/" | grep -v -e '-ffast-math .*-fno-fast-math ' ||
  fail "these files are compiled with -ffast-math"

shared=ON
[[ -z $(find "$work/built" -name 'libfovea.so') ]] || shared=OFF
echo "== the other kind: BUILD_SHARED_LIBS=$shared, whose objects are the same: ccache has them"
mapfile -t same < <(sed -nE 's/^(CMAKE_(BUILD_TYPE|CXX_FLAGS|COMPILE_WARNING_AS_ERROR):.*)$/-D\1/p' "$build_dir/CMakeCache.txt")
cmake -S "$source_dir" -B "$work/other_build" -G Ninja -DBUILD_SHARED_LIBS=$shared -DBUILD_TESTING=OFF "${same[@]}" \
  >"$work/log" || { cat "$work/log"; fail "configuring failed"; }
cmake --build "$work/other_build" --target src/all >"$work/log" || { cat "$work/log"; fail "the library does not build"; }
cmake --install "$work/other_build" --prefix "$work/other" --component library >/dev/null
use_installed "$work/other"
