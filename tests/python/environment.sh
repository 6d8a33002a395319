#!/usr/bin/env bash
# usage: environment.sh VENV
# Makes a virtual environment with PyTorch, JAX and a small model in it, or brings one up to date.  Where the system has
# the libraries of CUDA 13, PyTorch comes without its own copies of them, which weigh five times as much as itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
wanted=$(cat "$here"/requirements*.txt "${BASH_SOURCE[0]}" | sha256sum)
if [[ -e $venv/done && $(<"$venv/done") == "$wanted" ]]; then exit 0; fi

rm -rf "$venv"
python3 -m venv "$venv"
install() { "$venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }  # Python compiles what is imported
works() { "$venv/bin/python" -c 'import torch, sentence_transformers' 2>"$venv/import.log"; }

install -r "$here/requirements.txt"
install --no-deps -r "$here/requirements-torch.txt"
if [[ $(PATH=$PATH:/sbin ldconfig -p) == *libcublas.so.13* ]]; then
  install --no-deps nvidia-cudnn-cu13 nvidia-cufile nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
fi
works || install -r "$here/requirements-torch.txt"
works || { cat "$venv/import.log"; echo "environment.sh: PyTorch does not load from $venv" >&2; exit 1; }
printf '%s\n' "$wanted" >"$venv/done"
