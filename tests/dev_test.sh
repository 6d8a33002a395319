#!/usr/bin/env bash
# usage: dev_test.sh SOURCE_DIR
# `./dev build` on a machine that lacks packages which nobody there may install, or whose installation fails: it goes on
# without the optional ones, and names the others.  Every program that it runs is a fake.
# shellcheck disable=SC2016  # what fakes expand themselves
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
user=()
if [[ $EUID -eq 0 ]]; then
  command -v setpriv >/dev/null || { echo "no setpriv here, to be nobody by: skipped"; exit 77; }
  user=("$(command -v setpriv)" --reuid=65534 --regid=65534 --clear-groups)
fi

fail() { printf 'dev_test: %s; it said:\n%s\n' "$1" "$said" >&2; exit 1; }

# fake NAME TEXT: the program NAME.
fake() {
  printf '#!/bin/bash\n%s\n' "$2" >"$work/bin/$1"
  chmod 755 "$work/bin/$1"
}

# build MISSING: `./dev build` where these packages are not installed; its output is `said`, its status `status`.
build() {
  status=0
  said=$(env -u CXX MISSING="$1" PATH="$work/bin" "${user[@]}" "$work/dev" build 2>&1) || status=$?
}

mkdir "$work/bin" "$work/build"
cp "$1/dev" "$work"
chmod 755 "$work" "$work/bin"
chmod 777 "$work/build"
for tool in bash cat dirname env mkdir; do ln -s "$(command -v "$tool")" "$work/bin"; done
fake dpkg-query '[[ " $MISSING " == *" ${*: -1} "* ]] || echo installed'
fake apt-cache 'echo "  Candidate: 1"'
fake c++ 'echo 12'
fake cmake 'echo "cmake $*"'

build libdnnl-dev
[[ $status == 0 && $said == *'libdnnl-dev cannot be installed here; '*'cmake --build '* ]] || fail "without root it wants oneDNN"
build "g++ ninja-build libdnnl-dev"
[[ $status == 1 && $said == *'as root, please: apt-get install g++ ninja-build' ]] || fail "it does not name what is missing"

fake sudo 'exec "$@"'
fake apt-get 'exit 100'
build libdnnl-dev
[[ $status == 0 && $said == *'libdnnl-dev cannot be installed here; '*'cmake --build '* ]] || fail "without a network it wants oneDNN"
fake apt-get '[[ $1 == update ]]'
build libdnnl-dev
[[ $status == 0 && $said == *'going on without libdnnl-dev; '*'cmake --build '* ]] || fail "it wants what apt-get cannot install"
build g++
[[ $status == 1 && $said == *'could not install g++'* ]] || fail "it goes on without a compiler"

# `./dev test` without what Python's tests need: all others run, and it fails in the end.
for tool in tee sed grep; do ln -s "$(command -v "$tool")" "$work/bin"; done
mkdir "$work/build/release"
printf '#!/bin/bash\necho \x27"nvrtc": "here"\x27\n' >"$work/build/release/fovea"
chmod 755 "$work/build/release/fovea"
chmod 777 "$work/build/release"
fake nproc 'echo 2'
fake ctest 'echo "100% tests passed, 0 tests failed out of 3"'
status=0
said=$(env -u CXX MISSING= PATH="$work/bin" "${user[@]}" "$work/dev" test 2>&1) || status=$?
[[ $status == 1 && $said == *'3 passed, 0 failed, 0 skipped'*'the Python package was not tested'* ]] || fail "it needs Python's environment"
mkdir -p "$work/tests/python" "$work/build/venv/bin"
touch "$work/tests/python/environment.sh"
printf '#!/bin/bash\n' >"$work/build/venv/bin/python"
chmod 755 "$work/build/venv/bin/python"
status=0
said=$(env -u CXX MISSING= PATH="$work/bin" "${user[@]}" "$work/dev" test 2>&1) || status=$?
[[ $status == 0 && $said == *'3 passed, 0 failed, 0 skipped' ]] || fail "it fails with Python's environment"
