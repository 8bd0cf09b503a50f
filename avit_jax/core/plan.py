"""How the images of a batch are put into buckets, and when removing tokens is worth it."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How layers run on the active tokens: in buckets, packed, or by one kernel; and the sizes.

    A plan affects only speed, memory and rounding.

    Attributes:
      bucket: number of images that go through a layer together. A small bucket has less
        padding, because its images have about the same number of tokens.
      full_bucket: number of images that run together while all of their tokens are active. It is
        rounded down to a multiple of `bucket`, but is at least one bucket. Unused with
        `use_switch`.

      token_multiple: the tokens of a bucket are padded to a multiple of this. Below N / 2, they are
        padded to a multiple of twice this. Compile time grows with the number of multiples.
      chunk: maximum number of images that are sorted, and held in memory, at a time; inference
        only. A bucket is not larger.
      use_switch: selects the compiled number of tokens by a switch instead of loops, and puts
        tokens back by one scatter. Use it on GPUs: in a loop, the GPU waits for the host in each
        iteration; in a switch inside a command buffer, it does not. Avoid it on CPUs: XLA
        runs a switch on one core.
      one_kernel: on TPUs, one kernel runs all layers of an image, if it supports the network, see
        `one_kernel.supports`. It is compiled for the same multiples of tokens. Other devices, and
        other networks, use buckets. For inference only. JAX cannot export a program for several
        platforms with it.
      packed: packs the active tokens of a chunk into one buffer instead of buckets; inference only.
        It applies if `adaptive.can_pack` returns True; other networks and devices use buckets. No
        GPU has run it yet.

    Raises:
      ValueError: a size is below 1.
    """

    bucket: int
    token_multiple: int
    chunk: int = 96
    full_bucket: int = 12
    use_switch: bool = False
    one_kernel: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        if min(self.bucket, self.token_multiple, self.chunk, self.full_bucket) < 1:
            raise ValueError(
                f"bucket, token_multiple, chunk and full_bucket must be at least 1; got {self}."
            )

    def with_even_buckets(self, batch: int) -> "Plan":
        """Returns the plan with the smallest bucket that needs no more buckets for a batch."""
        return dataclasses.replace(self, bucket=-(-batch // -(-batch // self.bucket)))

    def chunk_size(self, batch: int) -> int:
        """Returns the number of images per chunk of a batch; the last chunk may hold fewer.

        It is at most `chunk`, rounded up to whole buckets.
        """
        chunks = -(-batch // self.chunk)
        return min(batch, -(-batch // (chunks * self.bucket)) * self.bucket)

    def token_counts(self, num_tokens: int) -> tuple[int, ...]:
        """Returns the compiled numbers of tokens in ascending order; the last is `num_tokens`."""
        fine = range(self.token_multiple, num_tokens, self.token_multiple)
        coarse = 2 * self.token_multiple
        return (*(n for n in fine if 2 * n >= num_tokens or n % coarse == 0), num_tokens)


def training_plan(num_tokens: int, backend: str | None = None) -> Plan:
    """Returns a good plan for training with N tokens.

    The number of images in a bucket is the largest power of two with at most 2,080 tokens in total
    (25,600 on a GPU), but at least 1.

    Args:
      num_tokens: N.
      backend: "cpu", "gpu" or "tpu"; None for the default backend of JAX, which is then started.
    """
    gpu = (backend or jax.default_backend()) == "gpu"
    bucket = 2 ** (max(1, (25_600 if gpu else 2080) // num_tokens).bit_length() - 1)
    return Plan(bucket=bucket, token_multiple=max(8, num_tokens // 48 * 8), use_switch=gpu)


# GPU settings in which removal was measured to be faster than masking (H200, bfloat16, 224 pixels).
# Key: whether training. Values: minimum width, minimum images per device, maximum MACs ratio.
# Inference: experiments/inference_speed/h200_*.json. Training, against masking with `remat`:
# experiments/training_removal/h200.json. Both are tables of docs/speed.md.
_FASTER_ON_GPU = {False: ((192, 1024, 0.62), (384, 256, 0.4)), True: ((192, 256, 0.4),)}


def removal_pays(
    width: int,
    images: int,
    macs_ratio: float,
    *,
    training: bool = False,
    backend: str | None = None,
) -> bool:
    """Returns whether removing halted tokens is faster than masking them.

    On a GPU, the result is True only if removal was measured to be faster in a case that is no
    easier: no wider, with no more images, and with no lower MACs ratio. On other backends,
    the result is always True.

    Args:
      width: D, channels of a token.
      images: number of images of a call on each device.
      macs_ratio: MACs of the network as a ratio to those of the static network; 1 if unknown.
      training: whether gradients are needed.
      backend: "cpu", "gpu" or "tpu"; None for the default backend of JAX, which is then started.
    """
    if (backend or jax.default_backend()) != "gpu":
        return True
    return any(
        width >= d and images >= b and macs_ratio <= ratio
        for d, b, ratio in _FASTER_ON_GPU[training]
    )
