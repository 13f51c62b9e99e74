#!/usr/bin/env python
"""Draws the curves of a run from its TensorBoard events, as an SVG.

    python benchmarks/curves.py MODEL_DIR --output FILE.svg

The left panel has train_loss and eval_loss over steps; a right one has eval_accuracy, where the script measures it.
The same events give the same file with the same matplotlib. Colors can be read on light and on dark pages.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

GREY, BLUE, ORANGE = (
    "#808080",
    "#2f81f7",
    "#db6d28",
)  # of a contrast of 3 or more with white and with near black
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "curves",  # else ids are random
    "path.simplify": False,  # every point is drawn
    "font.size": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
}


def read_scalars(model_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Each scalar's steps and values, in order; of a step that was repeated after a resumption, the last value."""
    events = EventAccumulator(str(model_dir), size_guidance={"tensors": 0}).Reload()
    found = {}
    for name in events.Tags()["tensors"]:
        values = {
            event.step: float(event.tensor_proto.float_val[0]) for event in events.Tensors(name)
        }
        found[name] = sorted(values.items())
    return found


def plot(axes, points: list[tuple[int, float]], name: str, label: str, **style):
    """Draws a curve, its group named `name` in the file, and says in its color which it is and where it ends."""
    (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.5, **style)
    line.set_gid(name)
    axes.annotate(
        label, (1, points[-1][1]), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
        va="center", color=line.get_color(), annotation_clip=False,
    )  # fmt: skip


def draw(model_dir: Path, output: Path):
    scalars = read_scalars(model_dir)
    with matplotlib.rc_context(STYLE):
        panels = 1 + ("eval_accuracy" in scalars)
        figure = Figure(figsize=(4.5 * panels, 3), layout="constrained")
        (left, *right) = figure.subplots(1, panels, squeeze=False)[0]
        left.set_title("loss, nats a token")
        last = {name: points[-1][1] for name, points in scalars.items()}
        above = last.get("train_loss", 0) > last.get(
            "eval_loss", 0
        )  # labels stand apart, however close the curves
        for name, color, up in (("train_loss", BLUE, above), ("eval_loss", ORANGE, not above)):
            if name in scalars:
                label = f"{name.partition('_')[0]} {last[name]:.2f}"
                label = f"{label}\n" if up else f"\n{label}"
                marker = (
                    {"marker": "o", "markersize": 4}
                    if name == "eval_loss" or len(scalars[name]) == 1
                    else {}
                )
                plot(left, scalars[name], name, label, color=color, **marker)
        for axes in right:
            axes.set_title("eval_accuracy, of the hidden tokens")
            label = f"{last['eval_accuracy']:.1%}"
            plot(
                axes,
                scalars["eval_accuracy"],
                "eval_accuracy",
                label,
                color=ORANGE,
                marker="o",
                markersize=4,
            )
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in (left, *right):
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            axes.grid(color=GREY, alpha=0.25, linewidth=0.5)
        figure.savefig(
            output, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", type=Path, help="the output directory of a run")
    parser.add_argument("--output", type=Path, required=True, help="the file to write, .svg")
    args = parser.parse_args()
    draw(args.model_dir, args.output)


if __name__ == "__main__":
    main()
