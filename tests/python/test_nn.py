"""fovea.nn's layers against torch.nn's: results and gradients, weights, nesting, padding, and what explain says."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fovea
from fovea._observe import Operators
from fovea.nn import _fused

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nn"))
import torch_cases

CASES = 120
PAIRS = [
    (fovea.nn.MultiheadAttention, torch.nn.MultiheadAttention),
    (fovea.nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer),
    (fovea.nn.TransformerEncoder, torch.nn.TransformerEncoder),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def encoder(layers: int = 2, **options: Any) -> torch.nn.TransformerEncoder:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, **{"dropout": 0.0, "batch_first": True} | options)
    return torch.nn.TransformerEncoder(layer, layers, torch.nn.LayerNorm(32))


def batch(batch_first: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of 9, 4 and 6 tokens, and their key_padding_mask."""
    x = torch.randn(3, 9, 32)
    padding = torch.arange(9) >= torch.tensor([9, 4, 6])[:, None]
    return (x if batch_first else x.transpose(0, 1)), padding


def test_random_layers_keep_the_error_rule(monkeypatch):
    failures, fused = [], []
    at_once = _fused.attention
    monkeypatch.setattr(_fused, "attention", lambda *words: fused.append(1) or at_once(*words))
    for seed, dtypes in ((21, ("fp32",)), (22, ("fp16", "bf16"))):
        cases = torch_cases.draw_cases(seed, CASES if "fp32" in dtypes else CASES // 4, dtypes, beyond=False)
        for name, quotient, result in torch_cases.compare_python(cases):
            if not quotient <= 2:
                failures.append(f"seed {seed} {name}: {result} is off by {quotient:.3g} times: {cases[name][0]}")
    assert not failures, "\n".join(failures)
    assert len(fused) > 100  # of 150 layers, encoders of several among them


def composed(layer: fovea.nn.MultiheadAttention) -> fovea.nn.MultiheadAttention:
    """The same layer, made to leave the one node by a hook that changes nothing."""
    other = copy.deepcopy(layer)
    other.out_proj.register_forward_hook(lambda *_: None)
    return other


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("cross", [False, True])
def test_results_can_be_viewed_as_rows(batch_first, need_weights, cross):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=batch_first)
    x = torch.randn(5, 3, 32)
    for attention in (layer, composed(layer)):
        out, _ = attention(x, x.clone() if cross else x, x, need_weights=need_weights)
        assert out.view(-1, 32).shape == (15, 32)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights, packs", [(False, False), (False, True), (True, False)])
def test_results_can_be_written_over(batch_first, need_weights, packs):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=batch_first)
    layer.pack_padding = packs
    x, padding = batch(batch_first)
    x.requires_grad_()
    gradients = []
    for add in (torch.Tensor.add, torch.Tensor.add_):
        out, _ = layer(x, x, x, padding if packs else None, need_weights)
        gradients += torch.autograd.grad(add(out, x).square().sum(), x)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pads, packs", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("masked", ["", "bool", "float", "causal"])
@pytest.mark.parametrize("cross", [False, True])
def test_one_node_gives_what_operators_give(dropout, batch_first, pads, packs, masked, cross):
    layer = fovea.nn.MultiheadAttention(32, 4, dropout, batch_first=batch_first, bias=not masked)
    layer.pack_padding = packs
    x, padding = batch(batch_first)
    padding[1, 0] = True
    memory = torch.randn_like(x) if cross else x
    square = torch.rand(9, 9) < 0.3
    mask = {"": None, "bool": square, "float": torch.randn(9, 9), "causal": torch.ones(9, 9).triu(1) > 0}[masked]
    results = []
    for each in (layer, composed(layer)):
        leaves = [x.clone().requires_grad_()]
        leaves += [memory.clone().requires_grad_()] if cross else []
        torch.manual_seed(5)
        out, _ = each(
            leaves[0], leaves[-1], leaves[-1], padding if pads else None, False, mask, is_causal=masked == "causal"
        )
        gradients = torch.autograd.grad((out * x.sin()).sum(), [*leaves, *each.parameters()])
        results.append((out, *gradients))
        nodes = set()
        walk = [out.grad_fn]
        while walk:
            node = walk.pop()
            nodes.add(type(node).__name__)
            walk += [after for after, _ in node.next_functions if after is not None]
        assert ("AddmmBackward0" in nodes or "MmBackward0" in nodes) == (each is not layer), nodes
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", itertools.product([False, True], repeat=5))
def test_whoever_is_frozen_gets_no_gradient_and_the_others_get_theirs(frozen):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True)
    results = []
    given, _ = batch()
    for each in (layer, composed(layer)):
        x = given.clone().requires_grad_(not frozen[0])
        for parameter, stays in zip(each.parameters(), frozen[1:], strict=True):
            parameter.requires_grad_(not stays)
        leaves = (x, *each.parameters())
        out, _ = each(x, x, x, need_weights=False)
        assert out.requires_grad != all(frozen)
        if not all(frozen):
            out.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
        assert [gradient is None for gradient in results[-1]] == list(frozen)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_one_node_under_autocast_gives_what_operators_give(masked):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True)
    results = []
    x, mask = batch()[0], torch.randn(9, 9, dtype=torch.bfloat16) if masked else None
    for each in (layer, composed(layer)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = each(leaf, leaf, leaf, need_weights=False, attn_mask=mask)
            loss = (out.float() * x).sum()
        assert out.dtype == torch.bfloat16
        assert (type(out.grad_fn).__name__ == "_AttentionBackward") == (each is layer)
        results.append((out, *torch.autograd.grad(loss, [leaf, *each.parameters()])))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("packs", [False, True])
def test_autocast_around_a_backward_pass_changes_nothing_in_it(packs):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True)
    layer.pack_padding = packs
    x, padding = batch()
    x.requires_grad_()
    out, _ = layer(x, x, x, padding, need_weights=False)
    sources = [x, *layer.parameters()]
    expected = torch.autograd.grad(out.square().sum(), sources, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(out.square().sum(), sources)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weights, packs", [(False, False), (False, True), (True, False)])
def test_gradients_are_not_differentiable_again(weights, packs, frozen):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True).requires_grad_(not frozen)
    layer.pack_padding = packs
    x, padding = batch()
    x.requires_grad_()
    out, _ = layer(x, x, x, padding, need_weights=weights)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        (out.square().mean() + gradient.square().sum()).backward(retain_graph=True)
    for source in (x,) if frozen else (x, layer.in_proj_weight, layer.out_proj.weight):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(gradient.sum(), source, allow_unused=True, retain_graph=True)


def test_explain_names_what_stands_against_one_node():
    x, padding = batch()
    kinds = {
        "": lambda layer: {},
        "weights are wanted": lambda layer: {"need_weights": True},
        "key and value are two tensors": lambda layer: {"key": x, "value": x.clone()},
        "a mask wants its gradient": lambda layer: {"mask": torch.zeros(9, 9, requires_grad=True)},
        "there are hooks on out_proj": lambda layer: layer.out_proj.register_forward_pre_hook(lambda *_: None) and {},
        "out_proj has another forward": lambda layer: setattr(layer, "out_proj", torch.nn.Linear(32, 32)) or {},
        "add_bias_kv adds a key": lambda layer: layer.__init__(32, 4, add_bias_kv=True, batch_first=True) or {},
        "key or value have another size than query": lambda layer: (
            layer.__init__(32, 4, kdim=8, vdim=8, batch_first=True) or {"key": torch.randn(3, 9, 8)}
        ),
    }
    for reason, prepare in kinds.items():
        layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True)
        call = prepare(layer)
        report = layer.explain(x, **call)
        assert report.composed == reason and reason in str(report)
        assert report.torch_products == (reason or "the tensors are on cpu, not on a GPU")
        assert f"products: {report.torch_products}" in str(report) or reason
        key = call.get("key", x)
        named = {"need_weights": call.get("need_weights", False), "attn_mask": call.get("mask")}
        out, _ = layer(x, key, call.get("value", key), **named)
        assert (type(out.grad_fn).__name__ == "_AttentionBackward") == (reason == ""), reason
    with Operators():
        assert "dispatch mode" in fovea.nn.MultiheadAttention(32, 4, batch_first=True).explain(x).composed


def test_hooks_and_parametrisations_of_out_proj_are_heard():
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True)
    x, _ = batch()
    before = layer(x, x, x, need_weights=False)[0]
    hook = layer.out_proj.register_forward_hook(lambda module, given, result: 2 * result)
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], 2 * before)
    hook.remove()
    torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], before)
    with torch.nn.utils.parametrize.cached():
        assert layer.explain(x).composed


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_constructor_call_and_class_are_torch_s(ours, theirs):
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    names = [list(inspect.signature(kind.forward).parameters) for kind in (ours, theirs)]
    assert names[0] == names[1]


def test_state_dicts_go_through_safetensors_both_ways(tmp_path):
    from safetensors.torch import load_file, save_file

    ours = fovea.nn.TransformerEncoder(fovea.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2)
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2)
    x, _ = batch()
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        target.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_convert_changes_classes_and_nothing_else():
    model = torch.nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
    model.eval()
    parameters, modules = list(model.parameters()), list(model.modules())
    calls = []
    model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    x, _ = batch()
    expected = model(x, x)
    calls.clear()
    assert fovea.nn.convert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)} == {
        fovea.nn.MultiheadAttention
    }
    assert type(model.encoder) is fovea.nn.TransformerEncoder
    torch.testing.assert_close(model(x, x), expected)
    assert calls == [1] and not model.encoder.training
    alone = fovea.nn.convert(torch.nn.MultiheadAttention(32, 4), pack_padding=True)
    assert type(alone) is fovea.nn.MultiheadAttention and alone.pack_padding


class SomebodysAttention(torch.nn.MultiheadAttention):
    pass


class SomebodysLayer(torch.nn.TransformerEncoderLayer):
    pass


def test_attention_of_somebody_else_s_gets_its_padding_and_is_not_explained():
    x, padding = batch()
    model = encoder()
    for layer in model.layers:
        layer.self_attn = SomebodysAttention(32, 4, batch_first=True)
    expected = model(x, src_key_padding_mask=padding)
    fovea.nn.convert(model, pack_padding=True)
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
    assert model.layers[0](x, None, padding).shape == x.shape
    with pytest.raises(ValueError, match="^a TransformerEncoderLayer whose attention is a SomebodysAttention "):
        model.explain(x, src_key_padding_mask=padding)
    stack = fovea.nn.TransformerEncoder(SomebodysLayer(32, 4, batch_first=True), 2)
    with pytest.raises(ValueError, match="^a SomebodysLayer whose attention is a MultiheadAttention is not Fovea's"):
        stack.explain(x)
    assert fovea.nn.convert(stack).explain(x).forward.backend


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_padding_changes_no_row_that_is_read(batch_first, causal):
    theirs = encoder(batch_first=batch_first)
    ours = fovea.nn.convert(copy.deepcopy(theirs), pack_padding=True)
    x, padding = batch(batch_first)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    padding[1, 0] = True  # not only at the ends
    read = ~padding if batch_first else ~padding.T
    if causal:
        read[1 if batch_first else 0, 0 if batch_first else 1] = False  # sees nothing
    weight = torch.randn_like(x) * read[..., None]
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = model(leaf, mask=mask, src_key_padding_mask=padding)
        loss = torch.where(read[..., None], out * weight, 0).sum()
        gradients = torch.autograd.grad(loss, [leaf, *model.parameters()])
        results.append((out[read], *gradients))
    if causal:  # torch gives NaN for the row that sees nothing, and passes it on to gradients
        results = [(result[0],) for result in results]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    layer = ours.layers[0]
    assert layer(x, mask, padding, is_causal=causal)[padding if batch_first else padding.T].eq(0).all()
    attention, _ = layer.self_attn(x, x, x, padding, False, mask, is_causal=causal)
    plain, _ = theirs.layers[0].self_attn(x, x, x, padding, True, mask)
    torch.testing.assert_close(attention[read], plain[read], rtol=1e-4, atol=1e-4)


def test_in_evaluation_padding_comes_out_as_torch_s():
    theirs = encoder().eval()
    ours = fovea.nn.convert(copy.deepcopy(theirs))
    x, padding = batch()
    holes = padding.clone()
    holes[0, 3] = True
    for mask in (padding, holes):
        with torch.no_grad():
            torch.testing.assert_close(
                ours(x, src_key_padding_mask=mask), theirs(x, src_key_padding_mask=mask), rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=mask), theirs(x, src_key_padding_mask=mask), rtol=1e-4, atol=1e-4
        )


def test_nested_tensors_of_both_layouts():
    layer = fovea.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    lengths = (5, 9, 2)
    parts = [torch.randn(n, 32) for n in lengths]
    for layout in (torch.jagged, torch.strided):
        out = layer(torch.nested.nested_tensor(parts, layout=layout))
        assert out.is_nested and out.layout == layout
        for piece, part in zip(out.unbind(), parts, strict=True):
            torch.testing.assert_close(piece, layer(part))
    # torch's own encoder makes strided ones of padding in evaluation.
    theirs = encoder().eval()
    mixed = copy.deepcopy(theirs)
    for each in mixed.layers:
        fovea.nn.convert(each)
    x, padding = batch()
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=padding)
        torch.testing.assert_close(mixed(x, src_key_padding_mask=padding), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_keys_and_values_of_different_lengths_are_refused(layout):
    layer = fovea.nn.MultiheadAttention(32, 4, batch_first=True)
    x, y, z = (
        torch.nested.nested_tensor([torch.randn(n, 32) for n in lengths], layout=layout)
        for lengths in ((5, 9), (9, 5), (5, 9))
    )
    assert layer(x, x, z, need_weights=False)[0].is_nested
    with pytest.raises(ValueError, match="key and value are nested tensors of different lengths"):
        layer(x, x, y, need_weights=False)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_mask_beside_nested_tensors_is_refused_but_for_the_causal_one(layout):
    layer = fovea.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    parts = [torch.randn(5, 32), torch.randn(5, 32)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for masks in (
        {"src_mask": later.T},
        {"src_key_padding_mask": later[:2]},
        {"src_mask": later, "src_key_padding_mask": later[:2], "is_causal": True},
    ):
        with pytest.raises(ValueError, match="^nested tensors take"):
            layer(x, **masks)
    expected = layer(torch.stack(parts), later, is_causal=True)
    for out in (layer(x, later, is_causal=True), layer(x, is_causal=True)):
        torch.testing.assert_close(torch.stack(out.unbind()), expected)
    with pytest.raises(ValueError, match="^a layer's explain takes no nested tensors"):
        layer.explain(x)
    with pytest.raises(ValueError, match="^a layer's explain takes no nested tensors"):
        layer.self_attn.explain(x)


def test_jagged_tensors_with_holes_are_refused():
    starts, lengths = torch.tensor([0, 1]), torch.tensor([3, 5])  # the last row is the last sequence's
    x = torch.nested.narrow(torch.randn(2, 6, 32), 1, starts, lengths, layout=torch.jagged)
    layer = fovea.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    for call in (layer, lambda x: layer.self_attn(x, x, x, need_weights=False)):
        with pytest.raises(ValueError, match="^a nested input is a jagged tensor with holes; make it contiguous first"):
            call(x)


@pytest.mark.parametrize("packs", [True, False])
def test_causal_without_a_mask_is_refused_where_padding_is_left_out(packs):
    x, padding = batch()
    model = fovea.nn.convert(encoder().eval(), pack_padding=packs)
    with torch.no_grad(), pytest.raises(RuntimeError, match="^is_causal is a hint"):
        model(x, src_key_padding_mask=padding, is_causal=True)


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_those_that_out_was_made_of(average):
    layer = fovea.nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True, add_zero_attn=True)
    x = torch.randn(2, 700, 8)  # more keys than a tile has
    torch.manual_seed(5)
    out, weights = layer(x, x, x, average_attn_weights=average)
    torch.manual_seed(5)
    assert torch.equal(layer(x, x, x, need_weights=False)[0], out)
    if not average:
        v = layer._project(x, x, x)[2]
        again = torch.einsum("bhqk,bkhd->bqhd", weights[..., :-1], v).flatten(2)
        torch.testing.assert_close(layer.out_proj(again), out, rtol=1e-4, atol=1e-4)
        assert 0.25 < weights[..., :-1].eq(0).float().mean() < 0.35
    (gradient,) = torch.autograd.grad(weights.square().sum(), layer.in_proj_weight)
    assert gradient.abs().max() > 0


def test_a_row_that_sees_no_key_gives_the_bias_of_out_proj():
    layer = fovea.nn.MultiheadAttention(8, 2, batch_first=True)
    torch.nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(1, 5, 8)
    out, _ = layer(x, x, x, key_padding_mask=torch.ones(1, 5, dtype=torch.bool), need_weights=False)
    assert torch.equal(out, layer.out_proj.bias.expand(1, 5, 8))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 24}])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_everything_is_torch_s(training, options, need_weights):
    theirs = torch.nn.MultiheadAttention(32, 4, dropout=1.0, batch_first=True, **options).train(training)
    torch.nn.init.normal_(theirs.out_proj.bias)
    x, keys = torch.randn(2, 5, 32), torch.randn(2, 7, options.get("kdim", 32))
    values = torch.randn(2, 7, 32) if options else keys
    results = []
    for layer in (theirs, fovea.nn.convert(copy.deepcopy(theirs))):
        y = x.clone().requires_grad_()
        out, weights = layer(y, keys, values, need_weights=need_weights)
        out.square().sum().backward()
        results.append([out, y.grad, *(p.grad for p in layer.parameters()), *([weights] if need_weights else [])])
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layers_of_dropped_everything_run_packed_compiled_and_are_explained():
    ours = fovea.nn.convert(encoder(dropout=1.0, norm_first=True), pack_padding=True)
    x, padding = batch()
    expected = ours.norm(x)  # what goes past both halves
    torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x), expected)
    packed = ours(x, src_key_padding_mask=padding)
    torch.testing.assert_close(packed[~padding], expected[~padding])
    assert "dropout leaves nothing" in str(ours.layers[0].self_attn.explain(x))


@pytest.mark.parametrize("training", [True, False])
def test_meta_tensors_give_the_shapes_that_tensors_give(training):
    ours = fovea.nn.convert(encoder(dropout=0.1)).train(training).to("meta")
    x, padding = (tensor.to("meta") for tensor in batch())
    mask = torch.ones(9, 9, dtype=torch.bool, device="meta")
    for options in ({}, {"mask": mask}, {"src_key_padding_mask": padding}):
        out = ours(x.requires_grad_(), **options)
        assert (out.shape, out.dtype, out.device.type) == ((3, 9, 32), torch.float32, "meta")
        out.sum().backward()
    weights = ours.layers[0].self_attn(x, x, x, average_attn_weights=False)[1]
    assert (weights.shape, weights.device.type) == ((3, 4, 9, 9), "meta")


def test_fake_tensors_give_the_shapes_that_tensors_give():
    with FakeTensorMode():
        layer, x = fovea.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), torch.empty(3, 9, 32)
        assert layer(x, src_key_padding_mask=torch.zeros(3, 9, dtype=torch.bool)).shape == x.shape


def test_no_keys_at_all_and_no_queries():
    layer = fovea.nn.MultiheadAttention(8, 2, batch_first=True)
    x, none = torch.randn(2, 5, 8), torch.randn(2, 0, 8)
    out, weights = layer(x, none, none)
    assert torch.equal(out, layer.out_proj.bias.expand(2, 5, 8)) and weights.shape == (2, 5, 0)
    out, weights = layer(none, x, x)
    assert out.shape == (2, 0, 8) and weights.shape == (2, 0, 5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights, packs", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_an_empty_batch_gives_an_empty_result_and_gradients(batch_first, weights, packs, options):
    layer = fovea.nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    layer.pack_padding = packs
    x = torch.randn((0, 3, 8) if batch_first else (3, 0, 8), requires_grad=True)
    padding = torch.zeros(0, 3, dtype=torch.bool)
    for mask in (None, torch.zeros(3, 3)):
        out, given = layer(x, x, x, padding, weights, mask)
        assert out.shape == x.shape and (given is not None) == weights
        gradients = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
        assert gradients[0].shape == x.shape and all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("training, packs", itertools.product([True, False], repeat=2))
def test_encoders_take_an_empty_batch(training, packs):
    x, padding = torch.randn(0, 9, 32, requires_grad=True), torch.zeros(0, 9, dtype=torch.bool)
    model = fovea.nn.convert(encoder().train(training), pack_padding=packs)
    for given in (None, padding):
        for each in (model, model.layers[0]):
            out = each(x, src_key_padding_mask=given)
            assert out.shape == x.shape and torch.autograd.grad(out.sum(), x)[0].shape == x.shape
            with torch.no_grad():
                assert each(x, src_key_padding_mask=given).shape == x.shape


@pytest.mark.parametrize("training, packs", itertools.product([True, False], repeat=2))
def test_sequences_of_no_tokens_give_none(training, packs):
    x, padding = torch.randn(2, 0, 32, requires_grad=True), torch.zeros(2, 0, dtype=torch.bool)
    model = fovea.nn.convert(encoder().train(training), pack_padding=packs)
    attention = model.layers[0].self_attn
    for given in (None, padding):
        for each in (model, model.layers[0], lambda x, src_key_padding_mask: attention(x, x, x, padding, False)[0]):
            out = each(x, src_key_padding_mask=given)
            assert out.shape == x.shape and torch.autograd.grad(out.sum(), x)[0].shape == x.shape
            with torch.no_grad():
                assert each(x, src_key_padding_mask=given).shape == x.shape


def test_hidden_nan_touches_nothing():
    layer = fovea.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    padding = torch.arange(6) >= torch.tensor([4, 6])[:, None]
    expected, _ = layer(x, x, x, padding, need_weights=False)
    memory = x.clone()
    memory[padding] = torch.nan
    out, _ = layer(x, memory, memory, padding, need_weights=False)
    torch.testing.assert_close(out, expected)


def test_compiled_layers_without_graph_breaks():
    model = fovea.nn.convert(encoder())
    x, padding = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("average", [True, False])
def test_compiled_weights_without_graph_breaks(average):
    layer = fovea.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 600, 8)  # more keys than a tile has
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, x, x, average_attn_weights=average), layer(x, x, x, average_attn_weights=average)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager"),
        lambda layer, x: torch.export.export(layer, (x, x, x)).module(),
        lambda layer, x: torch.jit.trace(layer, (x, x, x), check_trace=False),
    ],
)
def test_weights_of_a_graph_are_dropped_by_a_fresh_seed_in_every_call(make):
    layer = fovea.nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    x = torch.randn(2, 9, 8)
    graph = make(layer, x)
    torch.manual_seed(7)
    expected = layer(x, x, x)
    torch.manual_seed(7)
    first, second = graph(x, x, x), graph(x, x, x)
    torch.testing.assert_close(first, expected)
    assert not torch.equal(first[1] == 0, second[1] == 0)


def test_traced_layers_keep_neither_masks_nor_padding_nor_results():
    model = fovea.nn.convert(encoder()).requires_grad_(False).eval()
    x, padding = batch()
    masks = [torch.zeros(9, 9, dtype=torch.bool) for _ in range(2)]
    masks[0] |= torch.ones(9, 9, dtype=torch.bool).triu(1)  # which an eager call knows for causal
    masks[1][:, 3] = True
    traced = torch.jit.trace(model, (x, masks[0]))
    for mask in masks:
        torch.testing.assert_close(traced(x, mask), model(x, mask))
    traced = torch.jit.trace(lambda x, padding: model(x, src_key_padding_mask=padding), (x, padding))
    x, padding = x.flip(1), padding.flip(1)  # now it is at the beginning
    out, expected = traced(x, padding), model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding])
    model = fovea.nn.convert(model, pack_padding=True)
    with pytest.raises(RuntimeError, match="^torch.jit.trace would keep the padding of this batch"):
        torch.jit.trace(lambda x: model(x, src_key_padding_mask=padding), (x,))


def test_symbolic_tracing_takes_layers_for_leaves_where_it_is_told_to():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module) in [ours for ours, _ in PAIRS] or super().is_leaf_module(module, name)

    model = torch.nn.Sequential(torch.nn.Linear(32, 32), fovea.nn.convert(encoder()))
    x, _ = batch()
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    torch.testing.assert_close(torch.fx.GraphModule(model, Tracer().trace(model))(x), model(x))


def test_autocast_gives_what_torch_gives():
    theirs = encoder()
    ours = fovea.nn.convert(copy.deepcopy(theirs))
    x, padding = batch()
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (m(x, src_key_padding_mask=padding) for m in (ours, theirs))
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_explain_says_what_torch_really_runs():
    x, padding = batch()
    square = torch.ones(9, 9, dtype=torch.bool).triu(1)
    kernels = set()
    either = (True, False)
    for training, grad, dropout, batch_first, mask, pad, weights in itertools.product(
        either, either, (0.0, 0.1), either, (None, square, square * -9.0), (None, padding), either
    ):
        if mask is not None and mask.is_floating_point() and pad is not None:
            continue  # torch warns of the mix
        theirs = torch.nn.MultiheadAttention(32, 4, dropout, batch_first=batch_first).train(training)
        given = x if batch_first else x.transpose(0, 1)
        with torch.set_grad_enabled(grad):
            with Operators() as seen:
                theirs(given, given, given, pad, weights, mask)
            ours = fovea.nn.convert(theirs)
            report = ours.explain(given, mask=mask, key_padding_mask=pad, need_weights=weights)
        kernel = report.torch_kernel
        kernels.add(kernel)
        assert ("_native_multi_head_attention" in seen.names) == (report.torch_reason == ""), str(report)
        flash = any("flash_attention" in name for name in seen.names)
        assert flash == ("flash" in kernel), (str(report), seen.names)
        assert (report.torch_bytes > 0) == ("math" in kernel)
        assert (report.backward is not None) == grad and report.forward.backend.startswith("cpu")
    assert len(kernels) == 4


@pytest.mark.parametrize("batch_first, pads, packs", itertools.product([True, False], repeat=3))
def test_explain_of_an_empty_batch_is_refused_in_a_sentence(batch_first, pads, packs):
    x = torch.randn((0, 9, 32) if batch_first else (9, 0, 32))
    padding = torch.zeros(0, 9, dtype=torch.bool) if pads else None
    attention = fovea.nn.MultiheadAttention(32, 4, batch_first=batch_first)
    layer = fovea.nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    attention.pack_padding = layer.pack_padding = packs
    for explain in (
        lambda: attention.explain(x, key_padding_mask=padding),
        lambda: layer.explain(x, src_key_padding_mask=padding),
        lambda: fovea.nn.TransformerEncoder(layer, 2).explain(x, src_key_padding_mask=padding),
    ):
        with pytest.raises(ValueError, match=r"^the batch is empty \(\[.*\]\), and nothing runs for it"):
            explain()


def test_explain_of_the_encoder_layers():
    x, padding = batch()
    for training, grad, norm_first in itertools.product((True, False), (True, False), (True, False)):
        theirs = encoder(norm_first=norm_first).train(training)
        with torch.set_grad_enabled(grad):
            with Operators() as seen:
                theirs(x, src_key_padding_mask=padding)
            ours = fovea.nn.convert(theirs)
            report = ours.explain(x, src_key_padding_mask=padding)
        assert ("_transformer_encoder_layer_fwd" in seen.names) == (report.torch_reason == "")
        assert report.packed == (not training and not grad and not norm_first)
        assert ("packed=" in report.forward.problem) == report.packed
    assert fovea.nn.convert(theirs, pack_padding=True).explain(x, src_key_padding_mask=padding).packed
    alone = fovea.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    assert not alone.explain(x, src_key_padding_mask=padding).packed
    alone.pack_padding = True
    assert "packed=" in alone.explain(x, src_key_padding_mask=padding).forward.problem


@pytest.mark.parametrize(
    "sentence, call",
    {
        "query has 16 features but the layer takes 32": lambda layer, x: layer(x[..., :16], x, x),
        "query and key must both be nested tensors, or neither": lambda layer, x: layer(
            torch.nested.nested_tensor([x[0]], layout=torch.jagged), x, x, need_weights=False
        ),
        "value has 2 dimensions; query, key and value must all have 3, or all 2": lambda layer, x: layer(x, x, x[0]),
        "key is [3, 9, 32] but value [3, 8, 32]": lambda layer, x: layer(x, x, x[:, :8]),
        "query has 3 sequences but key has 2": lambda layer, x: layer(x, x[:2], x[:2]),
        "attn_mask has the shape [9, 8] but must be [9, 9] or [12, 9, 9]": lambda layer, x: layer(
            x, x, x, attn_mask=torch.ones(9, 8, dtype=torch.bool)
        ),
        "key_padding_mask has the shape [3, 8] but must be [3, 9]": lambda layer, x: layer(
            x, x, x, torch.ones(3, 8, dtype=torch.bool)
        ),
        "attn_mask is int64 but must be bool, float32 or query's dtype, float32": lambda layer, x: layer(
            x, x, x, attn_mask=torch.ones(9, 9, dtype=torch.int64)
        ),
        "key_padding_mask has the shape [1, 9] but must be [9]": lambda layer, x: layer(
            x[0], x[0], x[0], torch.zeros(1, 9, dtype=torch.bool)
        ),
        "key_padding_mask has the shape [1, 8] but must be [9]": lambda layer, x: layer.explain(
            x[0], key_padding_mask=torch.zeros(1, 8, dtype=torch.bool)
        ),
        "key is a NoneType, which is no PyTorch tensor": lambda layer, x: layer(x, None, None),
        "attn_mask is a list, which is no PyTorch tensor": lambda layer, x: layer(x, x, x, attn_mask=[[True] * 9] * 9),
        "key_padding_mask is a ndarray, which is no PyTorch tensor": lambda layer, x: fovea.nn.convert(encoder())(
            x, src_key_padding_mask=torch.zeros(3, 9, dtype=torch.bool).numpy()
        ),
        "attn_mask is a ndarray, which is no PyTorch tensor": lambda layer, x: fovea.nn.convert(encoder()).explain(
            x, mask=torch.zeros(9, 9).numpy()
        ),
    }.items(),
)
def test_wrong_calls_are_one_sentence(sentence, call):
    with pytest.raises(ValueError) as refusal:
        call(fovea.nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(3, 9, 32))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_causal_hint_without_a_mask_is_refused_as_in_torch():
    x = torch.randn(3, 9, 32)
    for layer in (torch.nn.MultiheadAttention(32, 4), fovea.nn.MultiheadAttention(32, 4)):
        with pytest.raises(RuntimeError, match="is_causal"):
            layer(x, x, x, is_causal=True)


def test_explain_refuses_what_forward_refuses():
    encoder_layer = fovea.nn.TransformerEncoderLayer(32, 4, 48)
    for module in (fovea.nn.MultiheadAttention(32, 4), encoder_layer, fovea.nn.TransformerEncoder(encoder_layer, 2)):
        with pytest.raises(RuntimeError, match="^is_causal is a hint"):
            module.explain(torch.randn(3, 9, 32), is_causal=True)
        with pytest.raises(ValueError, match="^query has 31 features but the layer takes 32"):
            module.explain(torch.randn(3, 9, 31))


@pytest.mark.parametrize("shape", [(2, 8), (2, 12), (10, 2), (20,)])
def test_a_padding_mask_of_another_shape_is_refused_where_padding_is_left_out(shape):
    x, padding = torch.randn(2, 10, 16), torch.zeros(shape, dtype=torch.bool)
    attention = fovea.nn.MultiheadAttention(16, 2, batch_first=True)
    layer = fovea.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = fovea.nn.TransformerEncoder(layer, 1).eval()
    attention.pack_padding = layer.pack_padding = True
    calls = [lambda: attention(x, x, x, padding, need_weights=False), lambda: layer(x, src_key_padding_mask=padding)]
    with torch.no_grad():
        for call in (*calls, lambda: encoder(x, src_key_padding_mask=padding)):
            with pytest.raises(ValueError, match=r"key_padding_mask has the shape"):
                call()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("shape", [(3, 3), (2, 9, 9)])
def test_a_causal_mask_of_another_shape_is_refused_where_padding_is_left_out(shape, packs):
    x, padding = batch()
    model = fovea.nn.convert(encoder(), pack_padding=packs)
    layer, mask = model.layers[0], torch.ones(shape, dtype=torch.bool).triu(1)
    attention, masks = layer.self_attn, dict(is_causal=True, src_key_padding_mask=padding)
    for call in (
        lambda: model(x, mask, **masks),
        lambda: layer(x, mask, **masks),
        lambda: attention(x, x, x, padding, False, mask, is_causal=True),
        lambda: model.explain(x, mask=mask, **masks),
        lambda: attention.explain(x, mask=mask, key_padding_mask=padding, is_causal=True),
    ):
        with pytest.raises(ValueError, match=r"^attn_mask has the shape \[.*\] but must be \[9, 9\] or \[12, 9, 9\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_layer_makes_of_masks_is_not_of_the_default_dtype(dtype):
    layer = fovea.nn.MultiheadAttention(32, 4, add_zero_attn=True, batch_first=True)
    x, padding = batch()
    padding[0, 2] = True
    square = torch.rand(9, 9) < 0.3
    expected, _ = layer(x, x, x, padding, attn_mask=square)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(layer(x, x, x, padding, attn_mask=square)[0], expected)
    finally:
        torch.set_default_dtype(before)


def test_masks_whose_last_dimension_has_a_stride_are_read():
    layer, theirs = (nn.MultiheadAttention(16, 2, batch_first=True) for nn in (fovea.nn, torch.nn))
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 10, 16)
    below = torch.ones(10, 10).triu().bool().transpose(0, 1)
    padding = torch.zeros(10, 2, dtype=torch.bool)
    padding[3, 1] = padding[5, 0] = True
    for mask in (~below, torch.zeros(10, 10).masked_fill(~below.T, -9.0).T):
        masks = dict(attn_mask=mask, key_padding_mask=padding.T if mask.dtype == torch.bool else None)
        torch.testing.assert_close(layer(x, x, x, **masks)[0], theirs(x, x, x, **masks)[0], rtol=1e-4, atol=1e-5)


def test_a_row_without_keys_has_the_weight_of_the_key_of_zeros():
    layer = fovea.nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True)
    x, padding = torch.randn(2, 4, 16), torch.zeros(2, 4, dtype=torch.bool)
    padding[1] = True
    weights = layer(x, x, x, padding)[1]
    assert weights.isfinite().all() and weights[1, :, -1].eq(1).all() and weights[1, :, :-1].eq(0).all()
