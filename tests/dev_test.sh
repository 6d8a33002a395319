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
