"""How the images of a batch are put into buckets, and when removing tokens is worth it."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the buckets in which `ragged` runs a layer.

    A plan affects speed, memory and the last digits only.

    Attributes:
      bucket: images that go through a layer together. Small buckets hold images of about the same
        number of tokens.
      full_bucket: without a switch, images that go through a layer together as long as all of their
        tokens are active; rounded down to whole buckets.
      token_multiple: the number of tokens of a bucket is padded to a multiple of this, and to a
        multiple of twice this below half of all tokens. Compile time grows with the number of
        multiples.
      chunk: images that are sorted, and whose tokens are in memory, at a time; inference only. A
        bucket is not larger.
      use_switch: selects the number of tokens of each bucket by a switch instead of loops, and puts
        tokens back by one scatter. For GPUs: the host reads the condition of a loop there, but not
        that of a switch inside a command buffer. On a CPU, XLA runs a switch on one core.

    Raises:
      ValueError: a size is below 1.
    """

    bucket: int
    token_multiple: int
    chunk: int = 96
    full_bucket: int = 12
    use_switch: bool = False

    def __post_init__(self) -> None:
        if min(self.bucket, self.token_multiple, self.chunk, self.full_bucket) < 1:
            raise ValueError(
                f"bucket, token_multiple, chunk and full_bucket must be at least 1; got {self}."
            )

    def evenly(self, batch: int) -> "Plan":
        """Returns the plan with as many buckets for `batch` images, but of equal size."""
        return dataclasses.replace(self, bucket=-(-batch // -(-batch // self.bucket)))

    def chunk_size(self, batch: int) -> int:
        """Returns the images of each chunk of a batch; the last chunk may hold fewer.

        They are at most `chunk`, rounded up to whole buckets.
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

    A bucket has a power of two images, with at most 2,080 tokens together (25,600 on a GPU).

    Args:
      num_tokens: N.
      backend: "cpu", "gpu" or "tpu"; None for the default backend of JAX, which is then started.
    """
    gpu = (backend or jax.default_backend()) == "gpu"
    bucket = 2 ** (max(1, (25_600 if gpu else 2080) // num_tokens).bit_length() - 1)
    return Plan(bucket=bucket, token_multiple=max(8, num_tokens // 48 * 8), use_switch=gpu)


# Where removal was measured to be faster than masking on a GPU: the least width and images per
# device, and the largest MACs ratio. NVIDIA H200, bfloat16, 224 pixels. Inference:
# experiments/inference_speed/h200_*.json. Training, against masking with `remat`:
# experiments/training_removal/h200.json. Both are tables of docs/speed.md. Keys: is it training?
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

    On a GPU it is only where that was measured.

    Args:
      width: D, channels of a token.
      images: of a call, per device.
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
