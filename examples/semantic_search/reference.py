#!/usr/bin/env python3
"""The embeddings that this example must give, by an implementation of its own: NumPy, in double precision.

    python3 reference.py FOLDER --out reference.safetensors     # FOLDER: vocab.txt and model.safetensors of the model
    python3 reference.py FOLDER --against-transformers          # the same sentences through the transformers package

Needs NumPy; the second also torch and transformers, and times them.
"""

import argparse
import json
import math
import pathlib
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "data"))
import make_sample as sample  # noqa: E402  its tokens, layers and files

LAYERS, HEADS, LONGEST = 6, 12, 256


def states(ids, w):
    """The last layer's output [tokens, features] of one sentence."""
    at = f"encoder.layer.{LAYERS - 1}"
    q, k, v, x = sample.project_qkv(ids, w, LAYERS - 1, HEADS)
    s = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    context = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(x.shape)
    x = sample.layer_norm(x + sample.dense(context, w, f"{at}.attention.output.dense"), w, f"{at}.attention.output.LayerNorm")
    inner = sample.gelu(sample.dense(x, w, f"{at}.intermediate.dense"))
    return sample.layer_norm(x + sample.dense(inner, w, f"{at}.output.dense"), w, f"{at}.output.LayerNorm")


def embed(sentences, folder):
    number = {piece: i for i, piece in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    w = sample.read_safetensors((folder / "model.safetensors").read_bytes())
    rows = []
    for sentence in sentences:
        pieces = sample.word_pieces(sentence, number)
        mean = states([number[p] for p in pieces[:-1][: LONGEST - 1] + pieces[-1:]], w).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


def by_transformers(sentences, folder, batch=32):
    import torch
    import transformers

    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def run():
        rows = []
        for first in range(0, len(sentences), batch):
            x = tokenizer(sentences[first : first + batch], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            with torch.no_grad():
                y = model(**x).last_hidden_state
            mask = x["attention_mask"][..., None]
            rows.append(torch.nn.functional.normalize((y * mask).sum(1) / mask.sum(1)))
        return torch.cat(rows).numpy()

    run()
    start = time.perf_counter()
    rows = run()
    print(f"  transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"batches of {batch}: {time.perf_counter() - start:.2f} s")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, default=HERE / "sentences.txt")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--against-transformers", action="store_true")
    arguments = parser.parse_args()
    sentences = arguments.text.read_text(encoding="utf-8").splitlines()
    rows = embed(sentences, arguments.folder)
    if arguments.out:
        sample.write_safetensors(arguments.out, {"embeddings": np.ascontiguousarray(rows, "<f4")}, {"model": sample.PACKAGE})
    if arguments.against_transformers:
        print(f"  at most {np.abs(by_transformers(sentences, arguments.folder) - rows).max():.1e} from this one")


if __name__ == "__main__":
    main()
