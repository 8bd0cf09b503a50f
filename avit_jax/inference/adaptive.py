"""Inference that removes halted tokens, with the logits of `vit.AViT` up to rounding.

The attention weight of a halted token is 0, so it affects no other token. With merging, a token
merges in the layer in which it halts. Once all tokens that the classifier reads have halted, the
logits of the image are final, so its other tokens stop.

`core.ragged` removes tokens in a program of fixed shapes. This module uses it from images to
logits. It runs chunks of images one after the other, which bounds the memory. Other ways to run
the layers are packed execution and one kernel for TPUs; see `Plan.packed` and `Plan.one_kernel`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from avit_jax.core import no_gradient
from avit_jax.core.plan import Plan, removal_pays
from avit_jax.inference import padding
from avit_jax.kernels import packed
from avit_jax.models import executors, flops, vit

_NO_GRADIENT = (
    "adaptive.apply has no gradient: train with model.apply (AViT(removal=...) removes halted "
    "tokens there too), or put jax.lax.stop_gradient around the variables and the images."
)
_KERNEL_CHIPS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")


def default_plan(batch: int | None, backend: str | None = None, cores: int | None = None) -> Plan:
    """Returns a good plan for batches of this size.

    The plans for CPUs and GPUs were chosen by measurements of DeiT-T on two cores of a CPU and on
    one NVIDIA H200. The plan for TPUs is a guess, because no TPU has run it. It uses the TPU kernel
    on the chips for which the tests compile it.

    Args:
      batch: number of images of a call; None if it is unknown.
      backend: "cpu", "gpu" or "tpu"; None for the default backend of JAX.
      cores: CPU cores of each device; None for `cores_per_device()`.
    """
    backend = backend or jax.default_backend()
    if backend == "gpu":
        # An unknown batch is padded to whole chunks, which are held in memory.
        bucket, chunk = (256, 1024) if batch else (64, 256)
        return Plan(bucket=bucket, token_multiple=32, chunk=chunk, use_switch=True)
    if backend != "cpu":
        kernel = getattr(jax.devices()[0], "device_kind", "") in _KERNEL_CHIPS
        return Plan(bucket=16, token_multiple=32, chunk=256, one_kernel=kernel)
    if (cores or cores_per_device()) <= 1:  # one core gains little from larger buckets
        return Plan(bucket=1, token_multiple=8, chunk=16, full_bucket=2)
    # Large buckets are faster, but have more padding, especially in small batches.
    if batch and batch >= 64:
        return Plan(bucket=8, token_multiple=8, chunk=64 if batch < 128 else 128)
    if batch is None or batch >= 16:
        return Plan(bucket=4, token_multiple=8)
    if batch > 2:
        return Plan(bucket=2, token_multiple=8)
    return Plan(bucket=1, token_multiple=16)


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_per_device() -> int:
    """Returns the number of usable cores divided by the local devices; at least 1."""
    return max(1, usable_cores() // jax.local_device_count())


def apply(
    model: vit.AViT,
    variables: Any,
    images: jax.Array,
    *,
    plan: Plan | None = None,
    features: bool = False,
) -> tuple[jax.Array, vit.Aux]:
    """Classifies images like `model.apply(variables, images)`, without computing halted tokens.

    It runs under `jit`, under `pmap` (each device sorts its own images), and under `jax.export`,
    with a symbolic batch too. It has no gradient: use `model.apply` for training.

    A CPU is fastest if each core is a device, as in `--mode=eval`. In Python, before JAX is used:

      jax.config.update("jax_num_cpu_devices", adaptive.usable_cores())
      run = jax.pmap(functools.partial(adaptive.apply, model), in_axes=(None, 0))
      logits, aux = run({"params": params}, images)  # images: (devices, images of each, H, W, C)

    Args:
      model: a network with halting.
      variables: `{"params": params}`, as for `model.apply`.
      images: `(B, H, W, C)` float, normalized, B at least 1.
      plan: sizes of the buckets, or packed execution; None for `default_plan`.
      features: whether `Aux` holds the features of all patches. If so, an image stops only after
        all of its tokens have halted, and the layers always run in buckets.

    Returns:
      Logits `(B, C)`, and `Aux` with `macs_padded`.

    Raises:
      ValueError: the model does not halt, the images do not fit it, or there are none.
      TypeError: JAX needs a derivative of the result.
    """
    check(model, images)
    run = functools.partial(_apply, model, plan, features)
    return no_gradient.without_gradient(run, _NO_GRADIENT)(variables, images)


def check(model: vit.AViT, images: jax.Array) -> None:
    """Raises ValueError if `apply` cannot run the model on the images."""
    if model.halting is None:
        raise ValueError(
            "this model has no halting, so no token can be removed: call model.apply instead."
        )
    model.check_images(images)


def make_apply(
    model: vit.AViT, *, images: int | None = None, macs_ratio: float = 1.0
) -> Callable[[Any, jax.Array], tuple[Any, vit.Aux]]:
    """Returns `apply` or `model.apply`, whichever `removal_pays` expects to be faster.

    Args:
      model: the network; without halting, the result is `model.apply`.
      images: number of images of a call on each device. None: the result is `apply`, although
        masking may be faster.
      macs_ratio: MACs of the network as a ratio to those of the static network; 1 if unknown.
    """
    masks = images is not None and not removal_pays(model.width, images, macs_ratio)
    run: Any = model.apply
    if model.halting is not None and not masks:
        run = functools.partial(apply, model)
    return run


def classify_tokens(
    model: vit.AViT,
    variables: Any,
    x: jax.Array,
    exists: jax.Array,
    *,
    plan: Plan | None = None,
) -> tuple[jax.Array, vit.Aux]:
    """Classifies embedded tokens like `apply`, in one chunk; some tokens may be padding.

    Args:
      model: a network with halting.
      variables: as for `apply`.
      x: `(B, N, D)` tokens.
      exists: `(B, N)` bool, False for padding, which is inactive from the start.
      plan: as for `apply`.

    Returns:
      As `apply`.

    Raises:
      TypeError: JAX needs a derivative of the result.
    """
    plan = dataclasses.replace(plan or default_plan(len(x)), one_kernel=False)
    plan = dataclasses.replace(plan, bucket=min(plan.bucket, len(x))).with_even_buckets(len(x))
    run = functools.partial(_classify, model, plan=plan, features=False)
    logits, aux = no_gradient.without_gradient(run, _NO_GRADIENT)(variables, x, exists)
    return logits, _swap_layers_and_images(aux)


def _apply(
    model: vit.AViT, plan: Plan | None, features: bool, variables: Any, images: jax.Array
) -> tuple[jax.Array, vit.Aux]:
    """`apply` for images that fit: splits the batch into chunks of equal size."""
    batch = images.shape[0]
    if isinstance(batch, int):
        plan = plan or default_plan(batch)
        plan = dataclasses.replace(plan, bucket=min(plan.bucket, plan.chunk, batch))
        size = plan.chunk_size(batch)
    else:  # a symbolic batch: the last chunk is padded with images of zeros
        plan = plan or default_plan(None)
        plan = dataclasses.replace(plan, bucket=min(plan.bucket, plan.chunk))
        size = plan.chunk
    plan = plan.with_even_buckets(size)
    chunks = -(-batch // size)
    begins = jnp.arange(chunks) * size
    if isinstance(batch, int):
        # The last chunk overlaps the one before, and the overlap does not count. This saves a
        # padded copy of the images.
        starts = jnp.minimum(begins, batch - size)
        embedded = size if plan.use_switch else plan.bucket
    else:
        starts = begins
        images = jnp.pad(images, ((0, chunks * size - batch), *((0, 0),) * 3))
        embedded = plan.bucket

    def run(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, vit.Aux]:
        begin, start = chunk
        place = start + jnp.arange(size)
        exists = (begin <= place) & (place < batch)
        x = _embed(model, variables, images, start, exists, embedded)
        return _classify(model, variables, x, exists, plan, features)

    def in_order(x: jax.Array) -> jax.Array:
        if isinstance(batch, int):
            rest = x[-1, chunks * size - batch :]
            return jnp.concatenate([x[:-1].reshape(-1, *x.shape[2:]), rest])
        return x.reshape(chunks * size, *x.shape[2:])[:batch]

    logits, aux = jax.tree.map(in_order, jax.lax.map(run, (begins, starts)))
    return logits, _swap_layers_and_images(aux)


def _embed(
    model: vit.AViT,
    variables: Any,
    images: jax.Array,
    start: jax.Array,
    exists: jax.Array,
    step: int,
) -> jax.Array:
    """Embeds the images of a chunk, `step` at a time; small arrays stay in the cache of a CPU.

    Args:
      model: the network.
      variables: of the network.
      images: `(B, H, W, C)`.
      start: index of the first image.
      exists: `(size,)` bool, which images of the chunk exist.
      step: images at a time.

    Returns:
      Tokens `(size, N, D)`.
    """
    size = len(exists)

    def embed(begin: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(images, begin, step)
        run: Any = model.apply
        return run(variables, some, method="embed")

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, place = carry
        begin = jnp.minimum(place, size - step)  # the last images may overlap those before
        return jax.lax.dynamic_update_slice_in_dim(x, embed(start + begin), begin, 0), place + step

    if step == size:
        return embed(start)
    tokens = jax.eval_shape(embed, start)
    x = jnp.zeros((size, *tokens.shape[1:]), tokens.dtype)
    stop = jnp.max(jnp.where(exists, jnp.arange(size) + 1, 0))
    return jax.lax.while_loop(lambda carry: carry[1] < stop, body, (x, jnp.array(0)))[0]


def can_pack(model: vit.AViT, variables: Any, x: jax.Array) -> bool:
    """Returns whether packed execution, `Plan.packed`, supports a network and this device.

    The network must compute in bfloat16 or float16, with plain layers of at most 384 channels, and
    no merging. A GPU must be an NVIDIA GPU of compute capability 9.0 (H100, H200). Other backends
    are supported by plain JAX, which also computes halted tokens.

    Args:
      model: a network with halting.
      variables: as for `apply`.
      x: `(B, N, D)` embedded tokens of a chunk.
    """
    if model.halting is None or model.halting.merge or not model.is_plain:
        return False
    rows = packed.num_rows(x.shape[0] * x.shape[1])
    layers = variables["params"]["layers"]
    return packed.has_kernels() and packed.supports(layers, x.dtype, model.num_heads, rows)


def _classify(
    model: vit.AViT,
    variables: Any,
    x: jax.Array,
    exists: jax.Array,
    plan: Plan,
    features: bool,
) -> tuple[jax.Array, vit.Aux]:
    """Maps the tokens `(B, N, D)` of one chunk to logits and `Aux` with the image axis first."""
    by_bucket = functools.partial(padding.bucketed_macs, model, plan)
    bucketed = functools.partial(
        _classify_by, model, executors.Bucketed(plan), by_bucket, features=features
    )
    if features:  # only buckets give the tokens (B, N, D) after each layer
        return bucketed(variables, x, exists)
    if plan.packed and can_pack(model, variables, x):
        executor = executors.Packed(num_heads=model.num_heads, norm_eps=model.norm_eps)
        macs = functools.partial(padding.packed_macs, model)
        return _classify_by(model, executor, macs, variables, x, exists)
    if not plan.one_kernel:
        return bucketed(variables, x, exists)
    from avit_jax.models import one_kernel  # loads Pallas

    multiple = plan.token_multiple
    if not one_kernel.supports(model, x.dtype, multiple):
        return bucketed(variables, x, exists)
    macs = functools.partial(one_kernel.padded_macs, model, token_multiple=multiple)
    kernel = functools.partial(_classify_by, model, one_kernel.executor(model, multiple), macs)
    return jax.lax.platform_dependent(variables, x, exists, tpu=kernel, default=bucketed)


def _classify_by(
    model: vit.AViT,
    executor: executors.Executor | executors.AtOnce,
    layer_macs: Callable[[jax.Array], jax.Array],
    variables: Any,
    x: jax.Array,
    exists: jax.Array,
    *,
    features: bool = False,
) -> tuple[jax.Array, vit.Aux]:
    """`_classify` by an executor; `layer_macs` maps active `(L, B, N)` to padded MACs `(B,)`."""
    network = model.clone(removal=None, remat=False)
    run: Any = network.apply
    options = {"exists": exists, "features": features, "method": "from_tokens"}
    logits, aux = run(variables, x, executor, **options)
    # Rounding may leave the sum below the MACs without padding.
    macs = jnp.maximum(flops.fixed_macs(model) + layer_macs(aux.active), aux.macs)
    return logits, _swap_layers_and_images(dataclasses.replace(aux, macs_padded=macs))


def _swap_layers_and_images(aux: vit.Aux) -> vit.Aux:
    score, active = aux.score.swapaxes(0, 1), aux.active.swapaxes(0, 1)
    return dataclasses.replace(aux, score=score, active=active)
