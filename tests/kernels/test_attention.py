"""Attention by cuDNN: its arguments, its padding and its gradient, with JAX's plain attention in
the kernel's place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants

from avit_jax.core import halting
from avit_jax.kernels import attention
from avit_jax.models import vit


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of the kernel, which needs no GPU here."""
    calls, plain = [], jax.nn.dot_product_attention

    def call(query: jax.Array, *args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        assert implementation == "cudnn"
        calls.append({"num": query.shape[1], "dtype": query.dtype})
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return plain(query, *args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return calls


def _tokens(dtype: Any, num: int) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (3, num, 2, 8)).astype(dtype) for i in range(3)]


def _bias(kind: str, num: int) -> jax.Array | None:
    active = jnp.arange(num)[None] < jnp.array(
        [[num], [3], [0]]
    )  # the tokens of one image have all halted
    size = jnp.broadcast_to((1 + jnp.arange(num) % 4).astype(float), (3, num))
    return attention.key_bias(
        active if "active" in kind else None, size if "size" in kind else None
    )


@pytest.mark.parametrize("num", [6, 7])
@pytest.mark.parametrize("kind", ["all", "active", "size", "active and size"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_kernel_gives_what_the_exact_path_gives(
    cudnn: list, dtype: Any, kind: str, num: int
) -> None:
    tokens, bias = _tokens(dtype, num), _bias(kind, num)
    heads_first = [x.swapaxes(1, 2).astype(jnp.float32) for x in tokens]
    expected, exact_vjp = jax.vjp(lambda *tokens: attention.exact(*tokens, bias), *heads_first)
    out, vjp = jax.vjp(lambda *tokens: attention._cudnn(*tokens, bias), *tokens)
    assert out.dtype == dtype
    close = functools.partial(np.testing.assert_allclose, rtol=0.03, atol=0.03)
    first = (
        slice(0, 2) if "active" in kind else slice(None)
    )  # nobody reads what an image without active tokens attends to
    close(out[first].swapaxes(1, 2).astype(jnp.float32), expected[first])
    assert jnp.isfinite(out).all()
    grad = jnp.cos(jnp.arange(expected.size)).reshape(expected.shape).at[2].set(0.0)
    with jax.numpy_dtype_promotion("standard"):  # of JAX's plain attention
        grads = vjp(grad.swapaxes(1, 2).astype(dtype))
    for ours, exact in zip(grads, exact_vjp(grad), strict=True):
        close(ours.swapaxes(1, 2).astype(jnp.float32), exact)
    assert cudnn == [
        {"num": num + num % 2, "dtype": dtype}
    ]  # JAX has no gradient for an odd number


def test_inference_is_not_padded(cudnn: list) -> None:
    attention._cudnn(*_tokens(jnp.bfloat16, 7), _bias("active", 7))
    assert cudnn[0]["num"] == 7


@pytest.mark.parametrize(
    ("dtype", "head_width", "expected"),
    [
        (jnp.bfloat16, 64, True),
        (jnp.float16, 128, True),
        (jnp.float32, 64, False),
        (jnp.float64, 64, False),
        (jnp.bfloat16, 12, False),
        (jnp.bfloat16, 136, False),
    ],
)
def test_where_there_is_a_kernel(dtype: Any, head_width: int, expected: bool) -> None:
    assert attention.can_fuse(jnp.dtype(dtype), head_width) == expected


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [("gpu", "9.0", True), ("gpu", "7.5", False), ("gpu", "gfx90a", False), ("tpu", "", False)],
)
def test_which_gpus_have_it(
    monkeypatch: pytest.MonkeyPatch, backend: str, capability: str, expected: bool
) -> None:
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention.has_cudnn.__wrapped__() == expected


@pytest.mark.parametrize(
    "gate", [None, halting.HaltingConfig(gamma=3.0, beta=-1.0), halting.HaltingConfig(merge=True)]
)
def test_a_network_that_asks_for_it_runs_without_a_gpu(
    cudnn: list, gate: halting.HaltingConfig | None
) -> None:
    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    model = vit.AViT(**sizes, halting=gate, dtype=jnp.bfloat16, fused_attention=False)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = model.init(jax.random.key(0), images)

    def run(model: vit.AViT) -> Any:
        return jax.value_and_grad(
            lambda params: (model.apply(params, images)[0].astype(jnp.float32) ** 2).sum()
        )(params)

    expected = run(model)
    assert not cudnn
    loss, grads = run(model.clone(fused_attention=True))
    assert cudnn  # traced, though not what this backend runs
    np.testing.assert_allclose(loss, expected[0], rtol=0.05)
    for ours, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, exact, atol=0.03 * float(jnp.abs(exact).max()) + 1e-6)
    run(model.clone(fused_attention=True, dtype=jnp.float32))
    assert all(call["dtype"] == jnp.bfloat16 for call in cudnn)


def test_large_logits_give_finite_weights() -> None:
    query, key, value = (
        jnp.array(x).reshape(1, 1, 2, 1) for x in ([200.0, 0.0], [5.0, 1.0], [1.0, 3.0])
    )
    np.testing.assert_allclose(attention.exact(query, key, value, None).ravel(), [1.0, 2.0])


@pytest.mark.parametrize("kind", ["qk_norm", "dinov3"])
def test_queries_and_keys_with_norms_or_a_rotation(cudnn: list, kind: str) -> None:
    model = variants.network(kind, halting=None, dtype=jnp.bfloat16, fused_attention=False)
    variables, images = {"params": variants.params(model)}, variants.images(model, 2)
    expected, _ = model.apply(variables, images)
    logits, _ = model.clone(fused_attention=True).apply(variables, images)
    assert cudnn
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(
        logits.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03 * scale
    )
