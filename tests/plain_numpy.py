"""An A-ViT of any kind in plain NumPy, image by image and token by token, to compare with."""

import math
from typing import Any

import numpy as np

from avit_jax.models import vit


def _norm(x: np.ndarray, params: Any, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


def _dense(x: np.ndarray, params: Any) -> np.ndarray:
    return x @ params["kernel"] + params.get("bias", 0.0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _activation(x: np.ndarray, name: str) -> np.ndarray:
    if name == "swiglu":
        gate, x = np.split(x, 2, axis=-1)
        return gate * _sigmoid(gate) * x
    if name == "quick_gelu":
        return x * _sigmoid(1.702 * x)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _rotated(model: vit.AViT, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rotates queries or keys `(n, K)` of tokens as DINOv3 does, as complex numbers."""
    (rows, columns), width, x = model.grid, x.shape[1], x.copy()
    for i, patch in enumerate(index - model.num_prefix_tokens):
        if patch >= 0:
            row, column = divmod(patch, columns)
            places = 2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1
            periods = model.rope_theta ** np.arange(0, 1, 4 / width)
            turns = np.concatenate([place / periods for place in places])
            pairs = (x[i, : width // 2] + 1j * x[i, width // 2 :]) * np.exp(2j * np.pi * turns)
            x[i] = np.concatenate([pairs.real, pairs.imag])
    return x


def _layer(
    model: vit.AViT, x: np.ndarray, index: np.ndarray, p: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `(n, D)` through one layer, and the weights `(H, n, n)` of its attention.

    `index` is the index of each token in the image.
    """
    qkv = _dense(_norm(x, p["norm1"], model.norm_eps), p["qkv"])
    qkv = qkv.reshape(len(x), 3, model.num_heads, -1)
    heads, weights = [], []
    for i in range(model.num_heads):
        q, k, v = qkv[:, 0, i], qkv[:, 1, i], qkv[:, 2, i]
        if model.qk_norm:
            q, k = _norm(q, p["q_norm"], model.norm_eps), _norm(k, p["k_norm"], model.norm_eps)
        if model.rope_theta:
            q, k = _rotated(model, q, index), _rotated(model, k, index)
        weight = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        weights.append(weight / weight.sum(axis=1, keepdims=True))
        heads.append(weights[-1] @ v)
    branch = _dense(np.concatenate(heads, axis=1), p["proj"])
    x = x + (branch * p["ls1"]["gamma"] if model.layer_scale else branch)
    hidden = _dense(_norm(x, p["norm2"], model.norm_eps), p["fc1"])
    branch = _dense(_activation(hidden, model.mlp), p["fc2"])
    x = x + (branch * p["ls2"]["gamma"] if model.layer_scale else branch)
    return x, np.stack(weights)


def _embed(model: vit.AViT, image: np.ndarray, params: Any) -> np.ndarray:
    size, (rows, columns) = model.patch_size, model.grid
    patches = [
        image[size * i : size * (i + 1), size * j : size * (j + 1)].ravel()
        for i in range(rows)
        for j in range(columns)
    ]
    x = _dense(np.stack(patches), params["patch_embed"])
    prefix = [params[k][0] for k in ("cls_token", "dist_token", "reg_token") if k in params]
    positions = params["pos_embed"][0] if "pos_embed" in params else 0
    if np.ndim(positions) and len(positions) == len(x):
        x = np.concatenate([*prefix, x + positions])
    else:
        x = np.concatenate([*prefix, x]) + positions
    return _norm(x, params["norm_pre"], model.norm_eps) if model.pre_norm else x


def _attention_pool(model: vit.AViT, x: np.ndarray, p: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `(n, D)` to `(D,)`, and the weights `(H, n)` of the attention."""
    query = _dense(p["latent"][0, 0], p["q"]).reshape(model.num_heads, -1)
    key, value = np.split(_dense(x, p["kv"]), 2, axis=1)
    key, value = (a.reshape(len(x), model.num_heads, -1) for a in (key, value))
    weight = np.exp(np.einsum("hk,nhk->hn", query, key) / math.sqrt(query.shape[1]))
    weight /= weight.sum(axis=1, keepdims=True)
    x = _dense(np.einsum("hn,nhk->hk", weight, value).ravel(), p["proj"])
    hidden = _activation(_dense(_norm(x, p["norm"], model.norm_eps), p["fc1"]), model.mlp)
    return x + _dense(hidden, p["fc2"]), weight


def _logits(model: vit.AViT, x: np.ndarray, params: Any, attention: list) -> np.ndarray:
    """Outputs `(N, D)` of all tokens, averaged over layers, to logits `(C,)`."""
    if not model.fc_norm:
        x = _norm(x, params["norm"], model.norm_eps)
    patches = x[model.num_prefix_tokens :]
    if model.pool == "map":
        pooled, weights = _attention_pool(model, patches, params["attn_pool"])
        attention.append((np.arange(len(patches)), weights))
        return _dense(pooled, params["head"])
    x = {"token": x[0], "avg": patches.mean(axis=0), "max": patches.max(axis=0)}[model.pool]
    if model.fc_norm:
        x = _norm(x, params["fc_norm"], model.norm_eps)
    return _dense(x, params["head"])


def run(
    model: vit.AViT, params: Any, image: np.ndarray, attention: list | None = None
) -> tuple[np.ndarray, ...]:
    """Returns logits `(C,)`, outputs `(N, D)` averaged over layers, depth `(N,)` and features.

    The features `(rows, columns, D)` are the outputs of the patches in their last layers.

    Args:
      model: without merging.
      params: of the model, float64.
      image: `(H, W, channels)` float64.
      attention: list that gets the active tokens and their weights `(H, n, n)` for each layer, then
        the tokens and weights `(H, n)` of attention pooling.
    """
    attention = [] if attention is None else attention
    x, gate = _embed(model, image, params), model.halting
    total, depth = np.zeros(len(x)), np.zeros(len(x), int)
    output, active = np.zeros_like(x), np.arange(len(x))
    for i in range(model.depth):
        layer = {
            module: {leaf: array[i] for leaf, array in leaves.items()}
            for module, leaves in params["layers"].items()
        }
        x[active], weights = _layer(model, x[active], active, layer)
        attention.append((active, weights))
        running = []
        for token in active:
            depth[token] += 1
            score = 0.0
            if gate is not None:
                score = _sigmoid(gate.gamma * x[token, gate.channel] + gate.beta)
                assert (
                    abs(total[token] + score - 1 + gate.epsilon) > 1e-4
                )  # not decided by rounding
            if i < model.depth - 1 and (gate is None or total[token] + score < 1 - gate.epsilon):
                running.append(token)
                output[token] += score * x[token]
                total[token] += score
            else:
                output[token] += (1 - total[token]) * x[token]
        active = np.array(running, int)
    features = x if model.fc_norm else _norm(x, params["norm"], model.norm_eps)
    features = features[model.num_prefix_tokens :].reshape(*model.grid, -1)
    return _logits(model, output, params, attention), output, depth, features
