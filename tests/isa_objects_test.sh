#!/usr/bin/env bash
# usage: isa_objects_test.sh ISA OBJECT...
# Objects compiled for one instruction set may define symbols for the linker only in a namespace named after it.  A common
# inline function left in them as a weak symbol could be picked for the whole program, and crash every lesser machine.
# So would a function for others to call, or one that runs at start, before anybody has looked at what the machine has.
set -euo pipefail
isa=$1
shift
(($#)) || { echo "no objects to look at" >&2; exit 1; }
defined=$(nm -C --defined-only --extern-only "$@" | awk 'NF >= 3')
[[ -n $defined ]] || { echo "the objects define nothing: $*" >&2; exit 1; }
foreign=$(grep -vE "\b(flash_)?${isa}(::|\b)" <<<"$defined" || true)
if [[ -n $foreign ]]; then
  printf '%s\n' "$*" "defines outside of its namespace:" "$foreign" >&2
  exit 1
fi
unasked=$(grep -E "^[0-9a-f]+ T " <<<"$defined" || true)
unasked+=$(readelf --wide --sections "$@" | grep '\.init_array' || true)
if [[ -n $unasked ]]; then
  printf '%s\n' "$*" "has functions that run unasked or for everybody (kernels are reached by the table):" "$unasked" >&2
  exit 1
fi
wc -l <<<"$defined" | xargs printf '%d symbols, all its own\n'
