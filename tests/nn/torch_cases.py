#!/usr/bin/env python3
"""Random layers of Fovea and of PyTorch, with the same weights and inputs, forward and all gradients.

    python3 tests/nn/torch_cases.py build/release/tests/fovea_nn_cases --cases 500 --seed 1    # the C++ layers
    python3 tests/nn/torch_cases.py fovea.nn --cases 500 --seed 1                              # the Python layers
    python3 tests/nn/torch_cases.py --cases 24 --seed 42 --record tests/nn/torch_cases.safetensors  # what tests/nn replays

Needs torch and numpy.  The error rule: a result's error, its largest distance from PyTorch's in double precision, is at
most twice the plain layer's in the same dtype.  That is the largest of PyTorch's own layer's and of SAMPLES evaluations
of the contract's formula in Monte Carlo arithmetic (D. S. Parker, 1997): operands and results of every operation, forward
and backward, moved by one unit roundoff, up or down at random.  PyTorch's alone would be one sample of chance: with few
elements a lucky one, with one key even 0.

What torch's layers do not have (grouped heads, windows, rotary embedding, packed sequences, ...) is compared with the
formula, written down here with torch's operations.
"""

import argparse
import json
import math
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.utils._python_dispatch
import torch.utils._pytree

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


# ---- safetensors

def write(path, tensors, metadata):
    names = {np.dtype("float32"): "F32", np.dtype("bool"): "BOOL", np.dtype("int32"): "I32"}
    header, offset = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values()))


def read(path):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    types = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "I32": "<i4"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                tensors[name] = (tensors[name].astype(np.uint32) << 16).view(np.float32)
    return tensors


# ---- what is asked

def random_case(draw, beyond):
    """A layer's options and its call; `beyond`: also what torch's layers do not have."""
    kind = draw.choice(["mha", "mha", "layer", "layer", "encoder"])
    head_dim, heads = draw.choice([1, 3, 4, 8, 16]), draw.choice([1, 2, 3, 4])
    o = {"kind": kind, "embed_dim": head_dim * heads, "num_heads": heads, "bias": draw.random() < 0.8,
         "batch_first": draw.random() < 0.5, "dtype": "fp32"}
    sizes = {"batch": draw.randint(1, 4), "sq": draw.randint(1, 33)}
    sizes["skv"] = sizes["sq"]
    o["unbatched"] = draw.random() < 0.1
    if o["unbatched"]:
        sizes["batch"] = 1
    if kind == "mha":
        o["inputs"] = draw.choice(["one", "key_is_value", "three"])
        if o["inputs"] != "one":
            sizes["skv"] = draw.randint(1, 33)
        if o["inputs"] == "three" and draw.random() < 0.5:
            o["kdim"], o["vdim"] = draw.randint(1, 20), draw.randint(1, 20)
        if o["inputs"] == "key_is_value" and draw.random() < 0.3:
            o["kdim"] = o["vdim"] = draw.randint(1, 20)
        o["add_zero_attn"] = draw.random() < 0.3
        o["add_bias_kv"] = draw.random() < 0.3
        o["need_weights"] = draw.random() < 0.5
        o["average_attn_weights"] = draw.random() < 0.5
    else:
        o["dim_feedforward"] = draw.randint(1, 40)
        o["activation"] = draw.choice(["relu", "gelu"])
        o["norm_first"] = draw.random() < 0.5
        o["layer_norm_eps"] = draw.choice([1e-5, 1e-3])
        o["recompute"] = draw.random() < 0.3
        o["num_layers"] = draw.randint(1, 3) if kind == "encoder" else 1
        o["norm"] = kind == "encoder" and draw.random() < 0.5
    if draw.random() < 0.3 and not o.get("add_bias_kv"):
        o["causal"] = "top_left"
    if beyond:
        o["unbatched"] = o["add_bias_kv"] = False
        if heads % 2 == 0 and draw.random() < 0.5:
            o["num_kv_heads"] = heads // 2
        if draw.random() < 0.4:
            o["head_dim"] = draw.choice([2, 5, 16, 20])
        if draw.random() < 0.4:
            o["window_left"] = draw.randint(0, 20)
        if draw.random() < 0.4:
            o["window_right"] = draw.randint(0, 20)
        if draw.random() < 0.3:
            o["causal"] = draw.choice(["top_left", "bottom_right"])
        o["alibi"] = draw.random() < 0.4
        dim = o.get("head_dim", head_dim)
        if draw.random() < 0.5 and dim >= 2:
            o["rotary"] = {"base": draw.choice([100.0, 10000.0]), "dim": draw.randint(1, dim // 2) * 2,
                           "interleaved": draw.random() < 0.5}
        if draw.random() < 0.5:
            o["packed"], o["need_weights"] = True, False
    if not o.get("packed"):
        o["attn_mask"] = draw.choice(["", "", "bool", "float", "bool3", "float3"])
        o["key_padding_mask"] = draw.choice(["", "", "tail", "bool", "float"])
    return o, sizes


def tensors_of(o, sizes, draw):
    """Inputs and masks, as numpy; every row sees at least its first key."""
    rng = np.random.default_rng(draw.getrandbits(32))
    batch, sq, skv, embed = sizes["batch"], sizes["sq"], sizes["skv"], o["embed_dim"]
    t = {}
    def rows(length, features):
        if o.get("packed"):
            return (length, features)
        if o["unbatched"]:
            return (length, features)
        return (batch, length, features) if o["batch_first"] else (length, batch, features)
    def normal(shape):
        return rounded(rng.standard_normal(shape).astype(np.float32), o["dtype"])
    if o.get("packed"):
        lengths = lambda: np.array([draw.randint(0, 20) for _ in range(batch)])
        q_lengths = lengths()
        kv_lengths = q_lengths if o.get("inputs", "one") == "one" else lengths()
        t["cu_seqlens_q"] = np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32)
        t["cu_seqlens_kv"] = np.concatenate([[0], np.cumsum(kv_lengths)]).astype(np.int32)
        sq, skv = int(t["cu_seqlens_q"][-1]), int(t["cu_seqlens_kv"][-1])
    t["query"] = normal(rows(sq, embed))
    if o.get("inputs", "one") != "one":
        t["key"] = normal(rows(skv, o.get("kdim", embed)))
    if o.get("inputs") == "three":
        t["value"] = normal(rows(skv, o.get("vdim", embed)))
    t["dout"] = normal(rows(sq, embed))
    mask = o.get("attn_mask", "")
    shape = (batch * o["num_heads"], sq, skv) if mask.endswith("3") else (sq, skv)
    if mask.startswith("bool"):
        t["attn_mask"] = rng.random(shape) < 0.4
        t["attn_mask"][..., 0] = False
    elif mask:
        t["attn_mask"] = normal(shape)
        t["attn_mask"][rng.random(shape) < 0.2] = -np.inf
        t["attn_mask"][..., 0] = 1.0
    padding = o.get("key_padding_mask", "")
    if padding == "tail":
        t["key_padding_mask"] = np.arange(skv)[None] >= rng.integers(1, skv + 1, (batch, 1))
    elif padding == "bool":
        t["key_padding_mask"] = rng.random((batch, skv)) < 0.4
        t["key_padding_mask"][:, 0] = False
    elif padding:
        t["key_padding_mask"] = normal((batch, skv))
    if o["unbatched"] and padding:
        t["key_padding_mask"] = t["key_padding_mask"][0]
    return t


def rounded(array, dtype):
    return torch.from_numpy(array).to(TYPES[dtype]).to(torch.float32).numpy()


def is_beyond(o):
    keys = ("num_kv_heads", "head_dim", "window_left", "window_right", "alibi", "rotary", "packed")
    return any(o.get(k) is not None and o.get(k) is not False for k in keys) or o.get("causal") == "bottom_right"


# ---- PyTorch's own layers

def module_of(o, library=torch.nn):
    """The layer, of torch.nn or of fovea.nn."""
    if o["kind"] == "mha":
        return library.MultiheadAttention(o["embed_dim"], o["num_heads"], bias=o["bias"], add_bias_kv=o["add_bias_kv"],
                                          add_zero_attn=o["add_zero_attn"], kdim=o.get("kdim"), vdim=o.get("vdim"),
                                          batch_first=o["batch_first"])
    layer = library.TransformerEncoderLayer(o["embed_dim"], o["num_heads"], o["dim_feedforward"], 0.0, o["activation"],
                                            o["layer_norm_eps"], o["batch_first"], o["norm_first"], o["bias"])
    if o["kind"] == "layer":
        return layer
    norm = torch.nn.LayerNorm(o["embed_dim"], o["layer_norm_eps"], bias=o["bias"]) if o["norm"] else None
    return library.TransformerEncoder(layer, o["num_layers"], norm, enable_nested_tensor=False)


def triangle(o, sq, skv):
    """True where the band hides."""
    i, j = torch.arange(sq)[:, None], torch.arange(skv)[None]
    offset = 0 if o.get("causal") == "top_left" else skv - sq
    hidden = torch.zeros(sq, skv, dtype=torch.bool)
    if o.get("causal"):
        hidden |= j > i + offset
    if o.get("window_left") is not None:
        hidden |= j < i + offset - o["window_left"]
    if o.get("window_right") is not None:
        hidden |= j > i + offset + o["window_right"]
    return hidden, (i + offset - j).abs()


def call_torch(o, module, x, masks, dtype):
    attn, padding = masks
    hint = {}
    if o.get("causal"):
        # torch wants the triangle itself, and takes a hint that it is one; a mask besides has to be joined with it.
        length = lambda t: t.shape[-2 if o["batch_first"] or t.dim() == 2 else 0]
        hidden, _ = triangle(o, length(x["query"]), length(x.get("key", x["query"])))
        if attn is None and not o.get("add_zero_attn"):
            hint = {"is_causal": True}
        attn = hidden if attn is None else (attn | hidden if attn.dtype == torch.bool else attn.masked_fill(hidden, -torch.inf))
    if padding is not None and attn is not None and padding.dtype != attn.dtype:  # a mix that torch warns of
        as_float = lambda m: m if m.dtype != torch.bool else torch.zeros(m.shape, dtype=dtype).masked_fill(m, -torch.inf)
        attn, padding = as_float(attn), as_float(padding)
    if o["kind"] == "mha":
        key = x.get("key", x["query"])
        return module(x["query"], key, x.get("value", key), key_padding_mask=padding, attn_mask=attn,
                      need_weights=o["need_weights"], average_attn_weights=o["average_attn_weights"], **hint)
    names = ("src_mask", "src_key_padding_mask") if o["kind"] == "layer" else ("mask", "src_key_padding_mask")
    return module(x["query"], **dict(zip(names, (attn, padding))), **hint), None


# ---- the formula

class Formula:
    """The same layers, with what torch's do not have, out of plain operations; parameters by torch's names."""

    def __init__(self, o, w, masks, ends):
        self.o, self.w, self.masks, self.ends = o, w, masks, ends

    def linear(self, x, name, rows=None):
        weight = self.w[name + "weight"]
        bias = self.w.get(name + "bias")
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return torch.nn.functional.linear(x, weight, bias)

    def norm(self, x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.w[name + "weight"], self.w.get(name + "bias"),
                                              self.o["layer_norm_eps"])

    def rotate(self, x):  # [seqlen, heads, head_dim]
        r = self.o["rotary"]
        half = r["dim"] // 2
        angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * r["base"] ** (-torch.arange(half, dtype=torch.float64) * 2 / r["dim"])
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        first = slice(0, r["dim"], 2) if r["interleaved"] else slice(0, half)
        second = slice(1, r["dim"], 2) if r["interleaved"] else slice(half, r["dim"])
        a, b = x[..., first], x[..., second]
        y = x.clone()
        y[..., first] = a * cos - b * sin
        y[..., second] = b * cos + a * sin
        return y

    def one(self, q, k, v, batch):  # [seqlen, heads, head_dim]
        o = self.o
        if "rotary" in o:
            q, k = self.rotate(q), self.rotate(k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        keys = k.shape[0]
        if o.get("add_bias_kv"):
            k = torch.cat([k, self.w["bias_k"].view(1, *k.shape[1:])])
            v = torch.cat([v, self.w["bias_v"].view(1, *v.shape[1:])])
        s = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(q.shape[2]))
        s, more = s[..., :keys], s[..., keys:]
        hidden, distance = triangle(o, q.shape[0], keys)
        if o.get("alibi"):
            slopes = torch.exp2(-8 * torch.arange(1, o["num_heads"] + 1, dtype=torch.float64) / o["num_heads"]).to(s.dtype)
            s = s - slopes[:, None, None] * distance
        hidden = hidden[None].expand(s.shape).clone()
        for mask, part in ((self.masks[0], None), (self.masks[1], batch)):
            if mask is None:
                continue
            if part is not None:
                mask = mask.view(-1, keys)[part][None, None]
            elif mask.dim() == 3:
                mask = mask[batch * o["num_heads"] : (batch + 1) * o["num_heads"]]
            if mask.dtype == torch.bool:
                hidden |= mask
            else:
                s = s + mask
        s = torch.cat([s.masked_fill(hidden, -torch.inf), more], -1)
        if o.get("add_zero_attn"):
            s = torch.cat([s, torch.zeros_like(s[..., :1])], -1)
            v = torch.cat([v, torch.zeros_like(v[:1])])
        if s.shape[-1] == 0:
            return torch.einsum("hqk,khd->qhd", s, v), s
        empty = (s == -torch.inf).all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        largest = s.amax(-1, keepdim=True).detach()
        lse = torch.log(torch.exp(s - largest).sum(-1, keepdim=True)) + largest
        p = torch.exp(s - lse).masked_fill(empty, 0.0)
        return torch.einsum("hqk,khd->qhd", p, v), p

    def attention(self, query, key, value, prefix):
        o = self.o
        dim = o.get("head_dim", o["embed_dim"] // o["num_heads"])
        kv_heads = o.get("num_kv_heads", o["num_heads"])
        a, b = o["num_heads"] * dim, kv_heads * dim
        parts = (slice(0, a), slice(a, a + b), slice(a + b, a + 2 * b))
        projected = []
        for x, part, name in zip((query, key, value), parts, "qkv"):
            packed = prefix + "in_proj_weight" in self.w
            weight = self.w[prefix + "in_proj_weight"][part] if packed else self.w[f"{prefix}{name}_proj_weight"]
            bias = self.w.get(prefix + "in_proj_bias")
            projected.append(torch.nn.functional.linear(x, weight, None if bias is None else bias[part]).unflatten(-1, (-1, dim)))
        q, k, v = projected
        outs, weights = [], []
        if self.ends is not None:
            for n in range(len(self.ends[0]) - 1):
                iq, ik = (slice(e[n], e[n + 1]) for e in self.ends)
                outs.append(self.one(q[iq], k[ik], v[ik], n)[0].flatten(1))
            out = torch.cat(outs)
        else:
            axis = 0 if o["batch_first"] else 1
            for n in range(q.shape[axis]):
                y, p = self.one(*(x.select(axis, n) for x in (q, k, v)), n)
                outs.append(y.flatten(1))
                weights.append(p.mean(0) if o.get("average_attn_weights", True) else p)
            out, weights = torch.stack(outs, axis), torch.stack(weights)
        return self.linear(out, prefix + "out_proj."), weights

    def layer(self, x, prefix):
        act = torch.nn.functional.gelu if self.o["activation"] == "gelu" else torch.relu
        network = lambda y: self.linear(act(self.linear(y, prefix + "linear1.")), prefix + "linear2.")
        attend = lambda y: self.attention(y, y, y, prefix + "self_attn.")[0]
        if self.o["norm_first"]:
            x = x + attend(self.norm(x, prefix + "norm1."))
            return x + network(self.norm(x, prefix + "norm2."))
        x = self.norm(x + attend(x), prefix + "norm1.")
        return self.norm(x + network(x), prefix + "norm2.")

    def __call__(self, x):
        if self.o["unbatched"]:
            out, weights = self.batched({n: t.unsqueeze(0 if self.o["batch_first"] else 1) for n, t in x.items()})
            return out.flatten(0, 1), None if weights is None else weights[0]
        return self.batched(x)

    def batched(self, x):
        query = x["query"]
        key = x.get("key", query)
        if self.o["kind"] == "mha":
            return self.attention(query, key, x.get("value", key), "")
        if self.o["kind"] == "layer":
            return self.layer(query, ""), None
        for n in range(self.o["num_layers"]):
            query = self.layer(query, f"layers.{n}.")
        return self.norm(query, "norm.") if self.o["norm"] else query, None


def parameters(o, draw):
    """Random weights by torch's names; for what torch cannot make, its layer's shapes are changed."""
    torch.manual_seed(draw.getrandbits(31))
    o = {"add_bias_kv": False, "add_zero_attn": False} | o
    weights = {n: p.detach() for n, p in module_of(o).named_parameters()}
    dim = o.get("head_dim", o["embed_dim"] // o["num_heads"])
    a, b = o["num_heads"] * dim, o.get("num_kv_heads", o["num_heads"]) * dim
    made = {}
    for name, p in weights.items():
        shape = list(p.shape)
        last = name.split(".")[-1]
        if last in ("in_proj_weight", "in_proj_bias"):
            shape[0] = a + 2 * b
        elif last == "q_proj_weight":
            shape[0] = a
        elif last in ("k_proj_weight", "v_proj_weight"):
            shape[0] = b
        elif name.endswith("out_proj.weight"):
            shape[1] = a
        scale = 1.0 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        value = torch.randn(shape) * scale + (1.0 if "norm" in name and last == "weight" else 0.0)
        made[name] = rounded(value.numpy(), o["dtype"])
    return made


def compute(o, weights, tensors, dtype, formula=False, library=torch.nn):
    """{result: array} in a dtype, of the library's own layer where there is one, else or on request of the formula."""
    as_given = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(dtype) if a.dtype == np.float32 else torch.from_numpy(np.ascontiguousarray(a))
    x = {n: as_given(tensors[n]).requires_grad_() for n in ("query", "key", "value") if n in tensors}
    masks = tuple(as_given(tensors[n]) if n in tensors else None for n in ("attn_mask", "key_padding_mask"))
    if formula or is_beyond(o):
        w = {n: as_given(a).requires_grad_() for n, a in weights.items()}
        ends = (tensors["cu_seqlens_q"], tensors["cu_seqlens_kv"]) if o.get("packed") else None
        out, attention = Formula(o, w, masks, ends)(x)
    else:
        module = module_of(o, library).to(dtype)
        module.load_state_dict({n: as_given(a) for n, a in weights.items()})
        w = dict(module.named_parameters())
        out, attention = call_torch(o, module, x, masks, dtype)
    out.backward(as_given(tensors["dout"]))
    results = {"out": out.detach()}
    if o.get("need_weights") and attention is not None:
        results["weights"] = attention.detach()
    results |= {"d" + n: t.grad for n, t in x.items()}
    results |= {"grad/" + n: p.grad for n, p in w.items() if p.grad is not None}
    return {n: t.to(torch.float64).numpy() for n, t in results.items()}


def make_case(seed, dtypes=("fp32",), beyond=True):
    draw = random.Random(seed)
    o, sizes = random_case(draw, beyond=draw.random() < 0.4 and beyond)
    o["dtype"] = draw.choice(dtypes)
    tensors = tensors_of(o, sizes, draw)
    return o, parameters(o, draw), tensors


def draw_cases(seed, count, dtypes=("fp32",), beyond=True):
    return {f"case{n:04}": make_case(seed * 1_000_003 + n, dtypes, beyond) for n in range(count)}


SAMPLES = 8


class MonteCarloArithmetic(torch.utils._python_dispatch.TorchDispatchMode):
    """Moves what every operation takes and gives by one unit roundoff, up or down."""

    def __init__(self, unit, seed):
        super().__init__()
        self.unit, self.random = unit, torch.Generator().manual_seed(seed)

    def moved(self, x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        signs = torch.randint(0, 2, x.shape, generator=self.random) * 2.0 - 1.0
        return (x.detach() * (1 + self.unit * signs.double())).to(x.dtype)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(r.alias_info for r in function._schema.returns):
            return function(*arguments, **(named or {}))
        arguments = torch.utils._pytree.tree_map(self.moved, arguments)
        return torch.utils._pytree.tree_map(self.moved, function(*arguments, **(named or {})))


def plain_errors(o, weights, tensors, exact, mine=None):
    """{result: the plain layer's error}; no less than half a unit in the last place of the largest element.  Every sample can only
    make it larger: with `mine`, none is drawn once that agrees."""
    errors = {n: UNIT[o["dtype"]] * np.abs(a).max() if a.size else 0.0 for n, a in exact.items()}

    def add(plain):
        for n, a in exact.items():
            if a.size:
                errors[n] = max(errors[n], float(np.abs(plain[n] - a).max()))

    add(compute(o, weights, tensors, TYPES[o["dtype"]]))
    for sample in range(SAMPLES):
        if mine is not None and judge(exact, errors, mine)[0] <= 2:
            break
        with MonteCarloArithmetic(UNIT[o["dtype"]], sample):
            add(compute(o, weights, tensors, TYPES[o["dtype"]], formula=True))
    return errors


def judge(exact, errors, mine):
    """(the worst quotient of errors, its result's name); infinite where a result is absent or of another shape."""
    worst = (0.0, "nothing")
    for name, right in exact.items():
        if name not in mine or mine[name].shape != right.shape:
            return math.inf, name
        if right.size == 0:
            continue
        error = np.abs(mine[name] - right).max()
        quotient = error / errors[name] if errors[name] > 0 else (0.0 if error == 0 else math.inf)
        if not quotient <= worst[0]:
            worst = (quotient if quotient == quotient else math.inf, name)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="?", help="fovea.nn, or the program fovea_nn_cases with the C++ layers")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtypes", default="fp32", help="drawn from, of fp32,fp16,bf16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the C++ layers run")
    parser.add_argument("--record", type=pathlib.Path, help="write cases with what is expected of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    in_python = arguments.layers == "fovea.nn"
    cases = draw_cases(arguments.seed, arguments.cases, arguments.dtypes.split(","), beyond=not in_python)
    if arguments.record:
        file, metadata = as_file(cases)
        for name, (o, weights, tensors) in cases.items():
            exact = compute(o, weights, tensors, torch.float64)
            file |= {f"{name}/expected/{n}": a.astype(np.float32) for n, a in exact.items()}
            metadata[name] = json.dumps(o | {"errors": plain_errors(o, weights, tensors, exact)})
        write(arguments.record, file, metadata)
        return 0

    failed, worst, names = 0, (0.0, ""), list(cases)
    for first in range(0, len(names), CASES_A_FILE):
        some = {n: cases[n] for n in names[first : first + CASES_A_FILE]}
        for name, quotient, result in compare_python(some) if in_python else compare(arguments.layers, arguments.device, some):
            worst = max(worst, (quotient, f"{name} {result}"))
            if not quotient <= 2:
                failed += 1
                print(f"{name}: {result} is off by {quotient:.3g} times the plain layer's error: {json.dumps(cases[name][0])}")
    beyond = sum(is_beyond(o) for o, _, _ in cases.values())
    print(f"{len(cases) - failed} of {len(cases)} agree ({beyond} with options that torch's layers lack); "
          f"the largest error is {worst[0]:.2f} times that of as many samples of the plain layer as were drawn, in {worst[1]}; at most 2")
    return 1 if failed else 0


CASES_A_FILE = 20  # the program reads the whole header for each case


def as_file(cases):
    tensors, metadata = {}, {}
    for name, (o, weights, inputs) in cases.items():
        metadata[name] = json.dumps(o)
        tensors |= {f"{name}/weight/{n}": a for n, a in weights.items()} | {f"{name}/{n}": a for n, a in inputs.items()}
    return tensors, metadata


def compare_python(cases):
    """(name, quotient, the worst result) of each case, by the Python layers."""
    import fovea.nn

    for name, (o, weights, tensors) in cases.items():
        exact = compute(o, weights, tensors, torch.float64)
        mine = compute(o, weights, tensors, TYPES[o["dtype"]], library=fovea.nn)
        yield name, *judge(exact, plain_errors(o, weights, tensors, exact, mine), mine)


def compare(program, device, cases):
    """The same by the C++ layers."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write(folder / "in", *as_file(cases))
        (folder / "saved").mkdir()
        subprocess.run([program, device, folder / "in", folder / "out", folder / "saved"], check=True)
        results = read(folder / "out")
        for name, (o, weights, tensors) in cases.items():
            mine = {n.removeprefix(name + "/"): a for n, a in results.items() if n.startswith(name + "/")}
            exact = compute(o, weights, tensors, torch.float64)
            quotient, result = judge(exact, plain_errors(o, weights, tensors, exact, mine), mine)
            saved = read(folder / "saved" / name)
            if saved.keys() != weights.keys() or any((saved[n] != a).any() for n, a in weights.items()):
                quotient, result = math.inf, "the parameters saved"
            yield name, quotient, result


if __name__ == "__main__":
    sys.exit(main())
