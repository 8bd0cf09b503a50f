"""Losses: cross entropy, distillation, ponder loss, and the prior over depth."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from avit_jax.core import halting
from avit_jax.models import vit


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
    sigmoid: bool = False,
) -> jax.Array:
    """Returns the mean cross entropy of a softmax over all classes, or of a sigmoid per class.

    Args:
      logits: `(B, C)`, any float dtype; the loss is at least float32.
      targets: `(B, C)` probabilities, or `(B,)` int labels. With `sigmoid`, an image may have any
        number of classes of probability 1.
      label_smoothing: fraction of the target spread evenly over all classes, in [0, 1).
      class_weights: factor of the term of each class; empty: 1. The mean over images is
        not divided by their sum.
      sigmoid: whether each class has its own binary cross entropy. The loss is the mean over
        classes.

    Returns:
      Scalar, in nats.

    Reference: Touvron et al., arXiv 2204.07118, section 3 (DeiT-III's sigmoid).
    """
    logits = logits.astype(halting.at_least_float32(logits.dtype))
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    weights = jnp.asarray(class_weights or 1.0, logits.dtype).reshape(1, -1)
    if sigmoid:
        return (weights * optax.sigmoid_binary_cross_entropy(logits, targets)).mean()
    if class_weights:
        targets = targets * weights
    return optax.softmax_cross_entropy(logits, targets).mean()


def is_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether the most likely class is a label of the image, `(B,)` bool.

    Args:
      logits: `(B, C)`.
      labels: `(B,)` int, or `(B, C)` with 1 for each label of an image and 0 for other classes.
    """
    best = logits.argmax(-1)
    if labels.ndim == 1:
        return best == labels
    return jnp.take_along_axis(labels, best[:, None], axis=1)[:, 0] > 0


def distillation_loss(
    logits: jax.Array, teacher: jax.Array, *, targets: str = "hard", temperature: float = 1.0
) -> jax.Array:
    """Returns the mean loss of a student against a teacher. The teacher gets no gradient.

    Args:
      logits: `(B, C)` of the student, any float dtype; the loss is at least float32.
      teacher: `(B, C)` logits.
      targets: "hard": cross entropy with the teacher's most likely class. "soft":
        KL(teacher || student) at the temperature, times temperature**2, which keeps the size of
        the gradient.
      temperature: of soft targets.

    Returns:
      Scalar, in nats.

    Raises:
      ValueError: unknown targets.

    Reference: Touvron et al., arXiv 2012.12877, section 4 (hard); Hinton et al., arXiv 1503.02531
      (soft).
    """
    teacher = jax.lax.stop_gradient(teacher)
    if targets == "hard":
        return cross_entropy(logits, teacher.argmax(-1))
    if targets != "soft":
        raise ValueError(f'targets must be "hard" or "soft"; got "{targets}".')
    dtype = halting.at_least_float32(logits.dtype)
    log_p, log_q = (jax.nn.log_softmax(x.astype(dtype) / temperature) for x in (teacher, logits))
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean() * temperature**2


def ponder_loss(aux: vit.Aux) -> jax.Array:
    """Returns the mean ponder cost N + r over all tokens and images.

    The number of layers N has no gradient. Minimizing the remainder r raises the scores before the
    halting layer.

    Args:
      aux: of the forward pass.

    Returns:
      Scalar, in layers.

    Examples:
      >>> loss = cross_entropy(logits, labels) + ponder_weight * ponder_loss(aux)

    Reference: [A-ViT] section 3, L_ponder.
    """
    return aux.ponder_cost.mean()


def prior_loss(
    aux: vit.Aux,
    *,
    target_depth: float,
    width: float = 1.0,
    mode: str = "paper",
    reverse: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """Returns the KL divergence between the mean halting scores by layer, H, and a Gaussian.

    Args:
      aux: of the forward pass.
      target_depth: layer where the Gaussian peaks, from 1 to L.
      width: its standard deviation, in layers.
      mode: "paper": KL(H || Gaussian). H is the mean over all tokens of all images; halted tokens
        count as 0 and the last layer as 1. H is normalized. "official" reproduces the released
        code, to compare with its numbers: KL(target || H) / L. Its H is the mean score over all
        tokens, halted ones too, of all images but the first. H is normalized, then clipped to
        [0.01, 0.99]. The target peaks one layer later; `width` is ignored. The target has width 1
        and a sum above 1. At batch size 1 the loss is 0.
      reverse: KL(Gaussian || H) instead, in paper mode.
      axis_name: mapped axis over the devices that share the batch. H is then the mean over the
        whole batch. None: over the images of `aux`.

    Returns:
      Scalar, in nats.

    Raises:
      ValueError: unknown mode.

    Examples:
      >>> loss = cross_entropy(logits, labels) + prior_weight * prior_loss(aux, target_depth=8)

    Reference: [A-ViT] section 3, L_distr.
    """
    if mode == "official":
        return _official_prior_loss(aux.score, target_depth, axis_name)
    if mode != "paper":
        raise ValueError(f'mode must be "paper" or "official"; got "{mode}".')
    score = jnp.asarray(aux.score).at[-1].set(1.0)
    h = _mean_over(halting.score_by_layer(score, aux.active), axis_name)
    log_h = _log_normalized(h)
    log_prior = halting.depth_prior(len(h), center=target_depth, width=width).astype(h.dtype)
    if reverse:
        log_h, log_prior = log_prior, log_h
    return jnp.sum(jnp.exp(log_h) * (log_h - log_prior))


def _mean_over(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def _log_normalized(h: jax.Array) -> jax.Array:
    """Returns log(h / sum(h)), whose gradient stays finite if scores underflow."""
    h = jnp.maximum(h, jnp.finfo(h.dtype).tiny)
    return jnp.log(h) - jnp.log(h.sum())


def _official_prior_loss(score: jax.Array, target_depth: float, axis_name: str | None) -> jax.Array:
    """Returns the prior loss of the released code, see `prior_loss`; `score` is (L, B, N)."""
    num_layers, num_images, _ = score.shape
    is_first = jnp.arange(num_images) == 0
    count = num_images
    if axis_name is not None:
        is_first &= jax.lax.axis_index(axis_name) == 0
        count *= jax.lax.axis_size(axis_name)
    if count == 1:
        return jnp.zeros((), score.dtype)
    h = _mean_over(jnp.where(is_first[:, None], 0.0, score).mean((1, 2)), axis_name)
    log_q = jnp.clip(_log_normalized(h), jnp.log(0.01), jnp.log(0.99))
    layer = jnp.arange(num_layers, dtype=score.dtype)
    log_pdf = -0.5 * (layer - target_depth) ** 2
    first = jnp.where(layer < target_depth, log_pdf, -jnp.inf)
    log_target = log_pdf - jax.nn.logsumexp(first) + jnp.log(0.98)
    loss = jnp.sum(jnp.exp(log_target) * (log_target - log_q)) / num_layers
    return jnp.maximum(loss, 0.0)
