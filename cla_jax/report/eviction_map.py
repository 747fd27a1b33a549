"""A picture of what a policy has chosen: KV layers from top to bottom, KV heads from left to right."""

import os
from collections.abc import Mapping, Sequence

from cla_jax.evaluation import LayerProfile


def draw(profiles: Mapping[str, Sequence[LayerProfile]], path: str | os.PathLike[str]) -> None:
    """Draws the profiles of evaluations through evicting caches, one beside the other, into a file.

    A cell is a KV head. Its colour is the policy that most prompts chose. If there is nothing to choose, it
    is the share of the prompt that is kept. The number is that share, in per cent.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heads = [len(profile[0].kept) for profile in profiles.values()]
    layers = max(map(len, profiles.values()))
    size = (2.5 + sum(0.6 * n + 1.2 for n in heads), 1.6 + 0.35 * layers)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(profiles), squeeze=False, width_ratios=heads)[0]
    names: list[str] = []
    colours = ["#d9ecd0", "#b5d8e8", "#8fb8de", "#c9a7d8", "#f2b8a0"]
    for axes, (name, profile) in zip(panels, profiles.items(), strict=True):
        kept = np.array([layer.kept for layer in profile])
        if profile[0].policies:
            names = list(profile[0].policies)
            shares = np.array([[layer.policies[n].share for n in names] for layer in profile])
            colour, scale = ListedColormap(colours), {"vmin": -0.5, "vmax": len(colours) - 0.5}
            axes.imshow(shares.argmax(1), cmap=colour, aspect="auto", **scale)
        else:
            axes.imshow(kept, cmap="Greys", aspect="auto", vmin=0, vmax=2)
        for (p, k), share in np.ndenumerate(kept):
            axes.text(k, p, f"{share:.0%}", ha="center", va="center", fontsize=8)
        axes.set(title=name, xlabel="KV head")
        axes.title.set_fontsize(8)
        axes.set_xticks(range(kept.shape[1]))
        axes.set_yticks(range(len(profile)), [str(layer.kv_layer) for layer in profile])
    panels[0].set_ylabel("KV layer")
    if names:
        patches = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)]
        figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path)
