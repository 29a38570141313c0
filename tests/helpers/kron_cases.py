"""Builders of calls of the kron_precondition ops: cases.py has the calls."""

from __future__ import annotations

import torch

from tests.helpers.inputs import in_dtype, nan_filled, random_spds, random_vectors, scalars
from tests.helpers.oracles import randn


def _weights(layers, bias, seed):
    """W and b, or dW and db."""
    W = [randn(d_out, d_in, seed=seed + i) for i, (d_in, d_out) in enumerate(layers)]
    b = [randn(d_out if bias else 0, seed=seed + 50 + i) for i, (_, d_out) in enumerate(layers)]
    return W, b


def _joined_shapes(layers, bias):
    return [(d_out, d_in + bias) for d_in, d_out in layers]


def kron_precondition(layers, bias=True, without="", condition=10.0, layout=lambda t: t):
    """``without``: the side whose factors are missing, if one is: they are the identity."""

    def build(dtype):
        shapes = _joined_shapes(layers, bias)
        H_g = random_spds(tuple(g for g, _ in shapes), 20, condition)
        H_a = random_spds(tuple(a for _, a in shapes), 30, condition)
        M = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
        P, H_g, M, H_a, work = in_dtype(
            dtype, [nan_filled(*shapes), H_g, M, H_a, nan_filled(*shapes)]
        )
        P, M, work = ([layout(t) for t in matrices] for matrices in (P, M, work))
        args = dict(P=P, H_g=H_g, M=M, H_a=H_a, work=work)
        return args | {without: []} if without else args

    return build


def kron_precondition_grid(shapes, g, a, shared=False):
    """The tiles of layers of n_g x n_a with g and a blocks; ``shared`` scratch if asked for."""

    def build(dtype):
        args = {name: [] for name in ("P", "H_g", "M", "H_a", "work")}
        scratch = nan_filled((max(n_g * n_a for n_g, n_a in shapes),))[0].to(dtype)
        for i, (n_g, n_a) in enumerate(shapes):
            (M,), (P, work) = (
                in_dtype(dtype, [randn(n_g, n_a, seed=i)]),
                in_dtype(dtype, nan_filled((n_g, n_a), (n_g, n_a))),
            )
            work = scratch[: n_g * n_a].view(n_g, n_a) if shared else work
            rows, columns = torch.arange(n_g).chunk(g), torch.arange(n_a).chunk(a)
            H_g = in_dtype(dtype, random_spds(tuple(map(len, rows)), 20 + i))
            H_a = in_dtype(dtype, random_spds(tuple(map(len, columns)), 30 + i))
            for own_g, r in zip(H_g, rows, strict=True):
                for own_a, c in zip(H_a, columns, strict=True):
                    for name, matrix in (("P", P), ("M", M), ("work", work)):
                        args[name].append(matrix[r[0] : r[-1] + 1, c[0] : c[-1] + 1])
                    args["H_g"].append(own_g)
                    args["H_a"].append(own_a)
        return args

    return build


def momentum(layers, bias=True, mu=0.9, decay=1e-2, ok=None, layout=lambda t: t):
    def build(dtype):
        M = [randn(*shape, seed=i) for i, shape in enumerate(_joined_shapes(layers, bias))]
        M, dW, db, W, b = in_dtype(
            dtype, [M, *_weights(layers, bias, 100), *_weights(layers, bias, 200)]
        )
        return dict(
            M=M, dW=[layout(t) for t in dW], db=db, W=W, b=b, momentum=mu, weight_decay=decay, ok=ok
        )

    return build


def descend(layers, bias=True, ok=None):
    def build(dtype):
        P = [randn(*shape, seed=i) for i, shape in enumerate(_joined_shapes(layers, bias))]
        W, b, P = in_dtype(dtype, [*_weights(layers, bias, 100), P])
        return dict(W=W, b=b, P=P, step_size=scalars(0.3, len(layers)), ok=ok)

    return build


def _after_a_step(layers, bias, dtype):
    """W, b, saved and NaN for what is written: the step is a hundred times shorter than they."""
    args = descend(layers, bias)(dtype)
    W, b, P = args["W"], args["b"], args["P"]
    saved = [torch.cat([w, v[:, None]], 1) if bias else w for w, v in zip(W, b, strict=True)]
    saved = [w - 1e-2 * p for w, p in zip(saved, P, strict=True)]
    (out,) = in_dtype(dtype, [nan_filled(*((len(w),) for w in W))])
    return W, b, saved, out


def slope(layers, bias=True, layout=lambda t: t):
    def build(dtype):
        W, b, saved, out = _after_a_step(layers, bias, dtype)
        dW, db = in_dtype(dtype, [*_weights(layers, bias, 200)])
        return dict(slope=out, W=W, b=b, saved=saved, dW=[layout(t) for t in dW], db=db)

    return build


def output_change(layers, bias=True, layout=lambda t: t, means=lambda t: t):
    """The mean inputs have changed by a hundredth too."""

    def build(dtype):
        W, b, saved, out = _after_a_step(layers, bias, dtype)
        sizes = tuple(w.shape[1] for w in saved)
        a_bar = [0.5 + v for v in random_vectors(sizes, 300)]
        a_next = [v + 1e-2 * d for v, d in zip(a_bar, random_vectors(sizes, 400), strict=True)]
        if bias:
            for v in a_bar + a_next:
                v[-1] = 1
        a_bar, a_next = in_dtype(dtype, [a_bar, a_next])
        return dict(
            change=out, W=W, b=b, saved=[layout(w) for w in saved],
            a_bar=[means(v) for v in a_bar], a_bar_next=[means(v) for v in a_next],
        )  # fmt: skip

    return build


def restore(layers, undo, bias=True):
    def build(dtype):
        saved = [randn(*shape, seed=i) for i, shape in enumerate(_joined_shapes(layers, bias))]
        W, b, saved = in_dtype(dtype, [*_weights(layers, bias, 100), saved])
        return dict(W=W, b=b, saved=saved, undo=torch.tensor(undo))

    return build


def kron_step(layers, bias=True, ok=None, layout=lambda t: t):
    def build(dtype):
        W, b, dW, db = in_dtype(dtype, [*_weights(layers, bias, 100), *_weights(layers, bias, 200)])
        return kron_precondition(layers, bias)(dtype) | dict(
            W=W, b=b, dW=[layout(t) for t in dW], db=db, step_size=scalars(0.3, len(layers)),
            momentum=0.9, weight_decay=1e-2, ok=ok,
        )  # fmt: skip

    return build
