#!/usr/bin/env python
"""Draw the curves of a run from its TensorBoard events, as an SVG.

    python benchmarks/curves.py MODEL_DIR --output FILE.svg

The left panel shows train_loss and eval_loss over steps. A right panel shows eval_accuracy if the
script measures it. The same events and the same matplotlib give the same file. The colors are
readable on light and on dark pages.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Each has a contrast ratio of at least 3 with white and with near black.
GREY = "#808080"
BLUE = "#2f81f7"
ORANGE = "#db6d28"
DOTS = {"marker": "o", "markersize": 4}
STYLE = {
    # Text stays text.
    "svg.fonttype": "none",
    # Without a salt, ids are random.
    "svg.hashsalt": "curves",
    # Every point is drawn.
    "path.simplify": False,
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
    """Read the steps and values of each scalar, in order of steps.

    A resumed run may repeat steps. The last value of a step counts.
    """
    events = EventAccumulator(str(model_dir), size_guidance={"tensors": 0}).Reload()
    scalars = {}
    for name in events.Tags()["tensors"]:
        values = {}
        for event in events.Tensors(name):
            values[event.step] = float(event.tensor_proto.float_val[0])
        scalars[name] = sorted(values.items())
    return scalars


def plot(axes, points: list[tuple[int, float]], name: str, label: str, **style):
    """Draw a curve as the group `name` of the file, with a label in its color at its end."""
    steps, values = zip(*points, strict=True)
    (line,) = axes.plot(steps, values, linewidth=1.5, **style)
    line.set_gid(name)
    axes.annotate(
        label,
        (1, values[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=line.get_color(),
        annotation_clip=False,
    )


def draw_losses(axes, scalars: dict[str, list[tuple[int, float]]]):
    """Draw train_loss and eval_loss."""
    axes.set_title("loss, nats a token")
    last = {name: points[-1][1] for name, points in scalars.items()}
    # An empty line below or above each label keeps the two apart, however close the curves are.
    train_is_above = last.get("train_loss", 0) > last.get("eval_loss", 0)
    if "train_loss" in scalars:
        label = f"train {last['train_loss']:.2f}"
        label = f"{label}\n" if train_is_above else f"\n{label}"
        points = scalars["train_loss"]
        dots = DOTS if len(points) == 1 else {}
        plot(axes, points, "train_loss", label, color=BLUE, **dots)
    if "eval_loss" in scalars:
        label = f"eval {last['eval_loss']:.2f}"
        label = f"\n{label}" if train_is_above else f"{label}\n"
        plot(axes, scalars["eval_loss"], "eval_loss", label, color=ORANGE, **DOTS)


def draw_accuracy(axes, points: list[tuple[int, float]]):
    """Draw eval_accuracy on a scale in percent that starts at 0."""
    axes.set_title("eval_accuracy, of the hidden tokens")
    last_accuracy = points[-1][1]
    plot(axes, points, "eval_accuracy", f"{last_accuracy:.1%}", color=ORANGE, **DOTS)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def draw(model_dir: Path, output: Path):
    """Draw the curves of the run in `model_dir` to the file `output`."""
    scalars = read_scalars(model_dir)
    has_accuracy = "eval_accuracy" in scalars
    num_panels = 2 if has_accuracy else 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5 * num_panels, 3), layout="constrained")
        panels = figure.subplots(1, num_panels, squeeze=False)[0]
        draw_losses(panels[0], scalars)
        if has_accuracy:
            draw_accuracy(panels[1], scalars["eval_accuracy"])
        for axes in panels:
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            axes.grid(color=GREY, alpha=0.25, linewidth=0.5)
        # A date would make each file different.
        metadata = {"Date": None, "Creator": None}
        figure.savefig(output, format="svg", transparent=True, metadata=metadata)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", type=Path, help="output directory of a run")
    parser.add_argument("--output", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    draw(args.model_dir, args.output)


if __name__ == "__main__":
    main()
