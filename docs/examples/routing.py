#!/usr/bin/env python3
"""Draw which experts each token of a text goes to, layer by layer.

    python docs/examples/routing.py [--model MODEL.dcalm] [--text TEXT] [--out routing.png]

Needs matplotlib. Without --model the demo model's 5 MoE layers of 16 experts, of which it takes 4 a token.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt

import deepcalm

STORY = (
    "Once upon a time there was a little dog named Max. Max loved to run in the park. One day he found a red ball. "
    "He was so happy!"
)


def routing(model: deepcalm.Model, ids: list[int]) -> dict[int, npt.NDArray[np.float32]]:
    """By MoE layer [n_routed_experts, n]: the weight of each expert's output for each token, 0 where not chosen."""
    session = model.session(ctx=len(ids), mtp=False)
    with session.trace("topk_idx", "topk_weight") as taps:
        session.prefill(ids)
    layers = {}
    for i in range(model.config.first_k_dense_replace, model.config.num_hidden_layers):
        chosen, weights = taps[f"layers.{i}.topk_idx"], taps[f"layers.{i}.topk_weight"]  # [n, num_experts_per_tok]
        layers[i] = np.zeros((model.config.n_routed_experts, len(ids)), np.float32)
        layers[i][chosen.T, np.arange(len(ids))] = weights.T
    return layers


def draw(layers: dict[int, npt.NDArray[np.float32]], tokens: list[str], out: str) -> None:
    from matplotlib.figure import Figure

    experts, n = next(iter(layers.values())).shape
    size = 2 + 0.2 * n, 1 + len(layers) * max(1.2, 0.07 * experts)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    top = max(float(w.max()) for w in layers.values())
    for axes, (i, weights) in zip(panels, layers.items(), strict=True):
        shown = np.ma.masked_equal(weights, 0)  # white: not chosen
        image = axes.imshow(shown, cmap="magma_r", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_ylabel(f"layer {i}\nexpert")
    panels[-1].set_xticks(range(n), tokens, rotation=90, fontsize=8)
    figure.colorbar(image, ax=panels, label="weight of the expert's output")
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=deepcalm.demo_path(), help="a packed file; default: the demo model")
    parser.add_argument("--text", default=STORY)
    parser.add_argument("--out", default="routing.png")
    args = parser.parse_args()
    model = deepcalm.Model(args.model)
    ids = model.encode(args.text)
    draw(routing(model, ids), [model.decode([t]) or "(bos)" for t in ids], args.out)
    print(args.out)


if __name__ == "__main__":
    main()
