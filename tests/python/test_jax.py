"""fovea.jax.attention: judged by the error rule, under jit and grad, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import fovea
from judge import GRADIENTS, Judged

TENSOR_OPTIONS = (
    "mask", "bias", "alibi_slopes", "sink", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv",
)  # fmt: skip


def to_jax(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return jnp.asarray(tensor.numpy())


def to_torch(array: jax.Array) -> torch.Tensor:
    values = np.array(array)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def solve(judged: Judged) -> dict[str, torch.Tensor]:
    tensors = {name: to_jax(tensor) for name, tensor in judged.inputs.items()}
    differentiable = {name: tensors[name] for name in GRADIENTS.values() if name in tensors}
    rest = {name: tensors[name] for name in TENSOR_OPTIONS if name in tensors and name not in differentiable}
    options = judged.options()

    def call(differentiable):
        return fovea.attention(**differentiable, **rest, **options, return_lse=True)

    (out, lse), pull = jax.vjp(jax.jit(call), differentiable)
    results = {"out": out, "lse": lse}
    if judged.backward:
        dlse = tensors["dlse"] if "dlse" in tensors else jnp.zeros_like(lse)
        (gradients,) = pull((tensors["dout"], dlse))
        results |= {name: gradients[source] for name, source in GRADIENTS.items() if source in gradients}
    return {name: to_torch(result) for name, result in results.items() if name in judged.wanted}


def test_random_problems_keep_the_error_rule():
    failures = []
    for seed in range(1000, 1040):
        judged = Judged(seed)
        failures += judged.failures(solve(judged))
    assert not failures, "\n".join(failures)


def arrays(layout="bshd"):
    random = np.random.default_rng(3)
    q, k, v = (jnp.asarray(random.standard_normal((2, 9, 4, 16)), jnp.float32) for _ in range(3))
    return (x.swapaxes(1, 2) for x in (q, k, v)) if layout == "bhsd" else (q, k, v)


def test_layouts_mean_the_same():
    out, lse = fovea.attention(*arrays(), causal="top_left", return_lse=True)
    out2, lse2 = fovea.attention(*arrays("bhsd"), causal="top_left", layout="bhsd", return_lse=True)
    np.testing.assert_array_equal(out, out2.swapaxes(1, 2))
    np.testing.assert_array_equal(lse, lse2)


def test_jax_numpy_and_torch_give_the_same_bits():
    q, k, v = arrays()
    out = fovea.attention(q, k, v, causal="bottom_right", softmax_scale=0.3, dropout_p=0.2, seed=5, offset=9)
    theirs = (torch.tensor(np.asarray(x)) for x in (q, k, v))
    expected = fovea.attention(*theirs, causal="bottom_right", softmax_scale=0.3, dropout_p=0.2, seed=5, offset=9)
    np.testing.assert_array_equal(out, expected.numpy())


def test_a_seed_array_changes_from_call_to_call_without_compiling_again():
    q, k, v = arrays()
    compiled = jax.jit(lambda seed: fovea.attention(q, k, v, dropout_p=0.5, seed=seed))
    first, second = compiled(jax.random.key_data(jax.random.key(1))), compiled(jnp.array([7, 0], jnp.uint32))
    assert jnp.abs(first - second).max() > 0.1 and compiled._cache_size() == 1
    np.testing.assert_array_equal(second, fovea.attention(q, k, v, dropout_p=0.5, seed=7))


@pytest.mark.parametrize(
    "sentence, options",
    {
        "seed (True) must be a whole number": dict(seed=True),
        "seed (-1) must be a whole number": dict(seed=-1),
        "seed (1.5) must be a whole number from 0 to 2^64 - 1 or uint32 [2], such as": dict(seed=1.5),
        "seed (float32 [2]) must be": dict(seed=np.array([1.5, 2.5], np.float32)),
        "seed (int32 [2]) must be": dict(seed=np.array([-1, 2], np.int32)),
        "seed (uint32 [3]) must be": dict(seed=np.array([1, 2, 3], np.uint32)),
        "seed (key<fry> []) must be": dict(seed=jax.random.key(0)),
        "offset (1.5) must be a whole number": dict(seed=np.array([1, 2], np.uint32), offset=1.5),
        "offset (-1) must be a whole number": dict(seed=np.array([1, 2], np.uint32), offset=-1),
        "max_seqlen_q (4.5) must be a whole number": dict(seed=1, max_seqlen_q=4.5),
        "max_seqlen_kv ('4') must be a whole number": dict(seed=1, max_seqlen_kv="4"),
        "max_seqlen_kv (True) must be a whole number": dict(seed=1, max_seqlen_kv=True),
    }.items(),
)
def test_a_number_that_is_none_is_refused_and_not_converted(sentence, options):
    with pytest.raises(ValueError) as refusal:
        fovea.attention(*arrays(), dropout_p=0.5, **options)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_seed_of_numpy_is_a_number():
    given = dict(dropout_p=0.5, offset=3)
    np.testing.assert_array_equal(
        fovea.attention(*arrays(), seed=np.int64(5), **given), fovea.attention(*arrays(), seed=5, **given)
    )


@pytest.mark.parametrize("name", ["q", "k", "v", "sink", "alibi_slopes", "q_lengths", "kv_lengths", "cu_seqlens_q"])
def test_an_array_of_no_dimensions_is_refused_and_not_passed_over(name):
    number = jnp.array(1, jnp.int32 if "seqlens" in name or "lengths" in name else jnp.float32)
    given = dict(zip("qkv", arrays())) | {name: number}
    with pytest.raises(ValueError, match=f"^{name} has no dimensions"):
        fovea.attention(**given)
    with pytest.raises(jax.errors.JaxRuntimeError, match="q has 1 dimensions but must be"):
        fovea.attention(*(array[0, 0, 0] for array in arrays()))


def test_vmap_runs_each_element():
    q, k, v = arrays()
    out = jax.vmap(lambda q, k, v: fovea.attention(q[None], k[None], v[None])[0])(q, k, v)
    np.testing.assert_allclose(out, fovea.attention(q, k, v), rtol=1e-6)


def test_refusals_carry_the_library_s_sentence():
    q, k, v = arrays()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"num_q_heads \(4\) must be a multiple of num_kv_heads \(3\)"):
        jax.block_until_ready(fovea.attention(q, k[:, :, :3], v[:, :, :3]))
    with pytest.raises(ValueError, match="causal .* must be 'top_left'"):
        fovea.attention(q, k, v, causal="lower")
    with pytest.raises(ValueError, match="needs a seed"):
        fovea.attention(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match="arrays are not written"):
        fovea.attention(q, k, v, out=q)
    with pytest.raises(jax.errors.JaxRuntimeError, match="backend 'warp' is unknown"):
        jax.block_until_ready(fovea.attention(q, k, v, backend="warp"))


def test_refusals_carry_it_from_a_compiled_call_that_has_run_before():
    q, k, v = arrays()
    attend = jax.jit(lambda lengths: fovea.attention(q, k, v, kv_lengths=lengths))
    jax.block_until_ready(attend(jnp.full(len(k), 3)))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"kv_lengths\[0\] \(99\) must be at most"):
        jax.block_until_ready(attend(jnp.full(len(k), 99)))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_no_sequences_and_no_heads_are_refused_as_by_the_other_adapters(layout):
    given = dict(zip("qkv", arrays(layout)))
    for axis, name in ((0, "batch"), (2 if layout == "bshd" else 1, "num_q_heads")):
        none = {letter: array.take(jnp.arange(0), axis) for letter, array in given.items()}
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{name} \(0\) must be at least 1"):
            fovea.attention(**none, layout=layout)


def test_a_masked_array_of_numpy_is_refused():
    hidden = np.ma.masked_array(np.ones((9, 9), bool), True)
    with pytest.raises(ValueError, match="^a MaskedArray has a mask that Fovea does not read"):
        fovea.attention(*arrays(), mask=hidden)


@pytest.mark.parametrize("way", [lambda call: call(), lambda call: jax.jit(call)()], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "name, given",
    [("kv_lengths", [3, 9]), ("q_lengths", (3, 9)), ("mask", [[True] * 9] * 9), ("k", "key"), ("v", None)],
)
def test_what_is_no_array_is_refused_in_a_sentence(name, given, way):
    arguments = dict(zip("qkv", arrays())) | {name: given}
    with pytest.raises(
        ValueError, match=rf"^{name} is a {type(given).__name__}, which is no array to JAX: give one of"
    ):
        way(lambda: fovea.attention(**arguments))
    with pytest.raises(ValueError, match="^bias is a Tensor, which is no array to JAX"):
        way(lambda: fovea.attention(*arrays(), bias=torch.zeros(9, 9)))


def test_a_report_of_what_is_being_traced_is_refused_in_a_sentence():
    q, k, v = arrays()
    for transform, kind in ((jax.jit, "Jaxpr"), (jax.grad, "Linearize")):
        with pytest.raises(ValueError) as refusal:
            transform(lambda q: (fovea.explain(q, k, v), q.sum())[1])(q)
        sentence = str(refusal.value)
        assert sentence.startswith("q cannot be read by DLPack: a ") and "\n" not in sentence
        assert kind in sentence and sentence.endswith("has no memory yet; call outside of jit and other transforms")


def test_the_report_reads_jax_arrays():
    assert fovea.explain(*arrays()).problem == "fwd fp32 b2 hq4 hkv4 sq9 skv9 d16"
