"""Draws ``paper-curve.png``: the numbers that the method's authors published, read off their plot.

    python docs/images/paper_curve.py

SiT-B/2 on ImageNet 256×256, FID of 10,000 samples without guidance. Source: Sun et al., 2026,
https://arxiv.org/abs/2601.07773; the values were read off a figure and are exact to about 0.5.
"""

from pathlib import Path

import matplotlib.pyplot as plt

STEPS = (50, 100, 200, 300, 400)
FID = {
    "SiT-B/2": (96, 67, 50, 43, 38.6),
    "with stage 1 alone": (91, 59, 41, 36, 32),
    "with stages 1 and 2": (74, 52, 31, 26, 23),
}
COLOURS = ("#777777", "#4c8fbf", "#c8553d")


def main() -> None:
    """Draw the three curves, each labelled at its end."""
    figure, axes = plt.subplots(figsize=(5.6, 3.0), dpi=160, facecolor="white", layout="constrained")
    for (name, values), colour in zip(FID.items(), COLOURS, strict=True):
        axes.plot(STEPS, values, marker="o", markersize=4, linewidth=2, color=colour)
        axes.annotate(
            f"{name}: {values[-1]:g}", (STEPS[-1], values[-1]), (8, 0), textcoords="offset points", va="center",
            color=colour,
        )  # fmt: skip
    axes.set(xlabel="training steps (thousands, batch 256)", ylabel="FID-10K", xlim=(35, 590), ylim=(0, 100))
    axes.set_xticks(STEPS)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("paper-curve.png"))


if __name__ == "__main__":
    main()
