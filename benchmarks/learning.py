#!/usr/bin/env python
"""Compare what the scripts and PyTorch learn from the same batches and the same initial weights.

    make pytorch
    python benchmarks/learning.py [--python .venv-pytorch/bin/python] [--objectives masked causal]
        [--steps 500] [--evaluations 10] [--json FILE]
    python benchmarks/learning.py --draw FILE --output FILE.svg

A script trains a small model, and its batches are recorded. PyTorch trains its own class of the
model on them, with torch.optim.AdamW and the same schedule in a plain loop. Each side evaluates
the same recorded batches. Weights come from one file, which PyTorch writes. Runs:

    script        with dropout
    other seed    the same, with another seed: other batches, other dropout
    PyTorch       with dropout, on the batches of the first run
    exact         two runs without dropout, one on each side, on the same batches: they differ by
                  rounding only

Columns: eval_loss after the last step of the first three, and the largest difference of any
evaluation from the first run, in nats a token: of the other seed, of PyTorch, and of PyTorch from
the script without dropout.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
SEEDS = (42, 43)
WARMUP_STEPS = 100
IGNORE = -100
DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "activation_dropout",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "hidden_dropout_prob",
    "resid_pdrop",
)


# ------------------------------------------------------------- the script's side: a child process


def first_device(batch) -> dict[str, np.ndarray]:
    """Copy the batch of the only device."""
    return {name: np.array(array)[0] for name, array in batch.items()}


def run_script(settings: dict) -> None:
    """Run a script. Write its batches and its evaluation losses to a file."""
    script = import_module(settings["script"].removesuffix(".py"))
    train_batches = []
    eval_batches = []
    losses = []
    make_steps = script.make_steps
    evaluate = script.evaluate

    def recording_steps(*args):
        p_train_step, p_eval_step = make_steps(*args)

        def record_train_step(state, totals, batch):
            micro_batches = first_device(batch)
            train_batches.append({name: array[0] for name, array in micro_batches.items()})
            return p_train_step(state, totals, batch)

        def record_eval_step(params, batch):
            eval_batches.append(first_device(batch))
            return p_eval_step(params, batch)

        return record_train_step, record_eval_step

    def recording_evaluate(*args):
        # All evaluations have the same batches.
        eval_batches.clear()
        results = evaluate(*args)
        losses.append(results["eval_loss"])
        return results

    script.make_steps = recording_steps
    script.evaluate = recording_evaluate
    script.main(settings["flags"])
    arrays = {}
    for kind, batches in (("train", train_batches), ("eval", eval_batches)):
        for name in batches[0]:
            # The last batch of an evaluation is filled up to the size of the others.
            arrays[f"{kind}/{name}"] = np.stack([batch[name] for batch in batches])
    np.savez(settings["batches"], **arrays)
    Path(settings["losses"]).write_text(json.dumps(losses))


# --------------------------------------------------------------- PyTorch's side: a child process


def recorded_batches(path: str, kind: str) -> list[dict]:
    """Read the batches of `run_script` as tensors."""
    import torch

    arrays = np.load(path)
    names = [name for name in arrays.files if name.startswith(f"{kind}/")]
    batches = []
    for number in range(len(arrays[names[0]])):
        batch = {}
        for name in names:
            batch[name.partition("/")[2]] = torch.from_numpy(arrays[name][number]).long()
        batches.append(batch)
    return batches


def loss_sum(model, batch: dict, is_causal: bool):
    """The sum of the cross-entropy, and the number of predicted tokens."""
    import torch.nn.functional

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    labels = batch["labels"]
    if is_causal:
        logits = logits[:, :-1]
        labels = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss, (labels != IGNORE).sum()


def evaluate_pytorch(model, batches: list[dict], is_causal: bool) -> float:
    """The mean loss of all predicted tokens."""
    import torch

    model.eval()
    total = 0.0
    count = 0
    with torch.no_grad():
        for batch in batches:
            loss, predicted = loss_sum(model, batch, is_causal)
            total += loss.item()
            count += predicted.item()
    model.train()
    return total / count


def run_pytorch(settings: dict) -> None:
    """Train on recorded batches. Write the evaluation losses to a file."""
    import torch
    import transformers
    from pytorch import make_pytorch_model

    torch.manual_seed(SEEDS[0])
    model = make_pytorch_model(settings["model_type"], settings["folder"])
    if settings["batches"] is None:
        model.save_pretrained(settings["folder"])
        return
    is_causal = settings["model_type"] == "gpt2"
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
    )
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, WARMUP_STEPS, settings["steps"]
    )
    eval_batches = recorded_batches(settings["batches"], "eval")
    losses = []
    model.train()
    for step, batch in enumerate(recorded_batches(settings["batches"], "train"), 1):
        loss, predicted = loss_sum(model, batch, is_causal)
        (loss / predicted).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % settings["eval_steps"] == 0:
            losses.append(evaluate_pytorch(model, eval_batches, is_causal))
    Path(settings["losses"]).write_text(json.dumps(losses))


# ------------------------------------------------------------------------------ the parent process


def start_child(python, side: str, settings: dict) -> None:
    """Run one side in a process of its own. Exit with its error if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, __file__, "--child", side, json.dumps(settings)],
        env=environment | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        sys.exit(run.stderr)


def without_dropout(folder: Path) -> Path:
    """Copy a folder of a model, and set each dropout of its configuration to 0."""
    copy = folder.with_name(f"{folder.name}-without-dropout")
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: 0.0 for name in DROPOUTS if name in config}))
    return copy


class Comparison:
    """The runs of one objective."""

    def __init__(self, args, directory: Path, objective: str):
        import harness

        self.args = args
        self.directory = directory
        self.objective = objective
        self.model_type = harness.OBJECTIVES[objective].model_type
        self.text = harness.write_corpus(directory, 2)
        lines = self.text.read_text("utf-8").splitlines(keepends=True)
        self.eval_text = directory / "eval.txt"
        self.eval_text.write_text("".join(lines[::25]), "utf-8")
        self.train_text = directory / "train.txt"
        kept = [line for number, line in enumerate(lines) if number % 25]
        self.train_text.write_text("".join(kept), "utf-8")
        self.folder = harness.write_model(
            directory, self.text, self.model_type, "small", args.length, 8000
        )
        settings = {"model_type": self.model_type, "folder": str(self.folder), "batches": None}
        start_child(args.python, "pytorch", settings)

    def run_script(self, folder: Path, seed: int, batches: Path) -> list[float]:
        """Run the script. Returns its evaluation losses, and writes its batches to a file."""
        import harness

        script, flags = harness.command(
            self.objective,
            folder,
            self.train_text,
            self.directory / "script",
            self.args.rows,
            self.args.length,
            model_name_or_path=folder,
            validation_file=self.eval_text,
            do_eval=True,
            per_device_eval_batch_size=self.args.rows,
            max_steps=self.args.steps,
            eval_steps=self.args.steps // self.args.evaluations,
            learning_rate=self.args.learning_rate,
            weight_decay=0.01,
            warmup_steps=WARMUP_STEPS,
            seed=seed,
        )
        # The command of the other benchmarks trains from scratch.
        flags = [flag for flag in flags if not flag.startswith(("--model_type", "--config_name"))]
        losses = self.directory / "losses.json"
        settings = {
            "script": script,
            "flags": flags,
            "batches": str(batches),
            "losses": str(losses),
        }
        start_child(sys.executable, "script", settings)
        return json.loads(losses.read_text())

    def run_pytorch(self, folder: Path, batches: Path) -> list[float]:
        """Train PyTorch's class on the batches. Returns the evaluation losses."""
        losses = self.directory / "losses.json"
        settings = {
            "model_type": self.model_type,
            "folder": str(folder),
            "batches": str(batches),
            "losses": str(losses),
            "steps": self.args.steps,
            "eval_steps": self.args.steps // self.args.evaluations,
            "learning_rate": self.args.learning_rate,
        }
        start_child(self.args.python, "pytorch", settings)
        return json.loads(losses.read_text())

    def measure(self) -> dict:
        """Make all runs. Returns the evaluation losses of each."""
        batches = [self.directory / f"batches-{number}.npz" for number in range(3)]
        exact_folder = without_dropout(self.folder)
        return {
            "objective": self.objective,
            "eval_steps": self.args.steps // self.args.evaluations,
            "script": self.run_script(self.folder, SEEDS[0], batches[0]),
            "other seed": self.run_script(self.folder, SEEDS[1], batches[1]),
            "PyTorch": self.run_pytorch(self.folder, batches[0]),
            "script, exact": self.run_script(exact_folder, SEEDS[0], batches[2]),
            "PyTorch, exact": self.run_pytorch(exact_folder, batches[2]),
        }


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def summary(runs: dict) -> list[float]:
    """The numbers of a line of the table."""
    last = [runs[name][-1] for name in ("script", "other seed", "PyTorch")]
    return [
        *last,
        largest_difference(runs["other seed"], runs["script"]),
        largest_difference(runs["PyTorch"], runs["script"]),
        largest_difference(runs["PyTorch, exact"], runs["script, exact"]),
    ]


def draw(figures: list[dict], output: Path) -> None:
    """Draw a panel for each objective with the evaluation losses of three runs."""
    import curves
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(curves.STYLE):
        num_rows = math.ceil(len(figures) / 2)
        figure = Figure(figsize=(9, 3 * num_rows), layout="constrained")
        panels = figure.subplots(num_rows, 2, squeeze=False).flatten()
        for axes, runs in zip(panels, figures, strict=False):
            axes.set_title(f"{runs['objective']}: eval_loss")
            for name, color, style in (
                ("other seed", curves.GREY, ":"),
                ("script", curves.BLUE, "-"),
                ("PyTorch", curves.ORANGE, "--"),
            ):
                steps = [runs["eval_steps"] * (1 + i) for i in range(len(runs[name]))]
                axes.plot(steps, runs[name], style, color=color, label=name, linewidth=1.5)
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            axes.grid(color=curves.GREY, alpha=0.25, linewidth=0.5)
            axes.legend(frameon=False)
        metadata = {"Date": None, "Creator": None}
        figure.savefig(output, format="svg", transparent=True, metadata=metadata)


def main():
    if sys.argv[1:2] == ["--child"]:
        run = {"script": run_script, "pytorch": run_pytorch}[sys.argv[2]]
        run(json.loads(sys.argv[3]))
        return
    import harness

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=ROOT / ".venv-pytorch/bin/python", help="with PyTorch")
    parser.add_argument(
        "--objectives", nargs="+", choices=harness.OBJECTIVES, default=list(harness.OBJECTIVES)
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=10, help="evaluations of a run")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--draw", type=Path, help="draw the curves of such a file and end")
    parser.add_argument("--output", type=Path, help="SVG file that --draw writes")
    args = parser.parse_args()
    if args.steps % args.evaluations:
        parser.error("--steps must be a multiple of --evaluations")
    if args.draw:
        draw(json.loads(args.draw.read_text())["figures"], args.output)
        return

    names = ("script", "other seed", "PyTorch", "seed diff", "PyTorch diff", "exact diff")
    print(f"{'':12}" + "".join(f"{name:>14}" for name in names))
    figures = []
    for objective in args.objectives:
        with tempfile.TemporaryDirectory() as directory:
            runs = Comparison(args, Path(directory), objective).measure()
        figures.append(runs)
        cells = "".join(f"{value:14.5f}" for value in summary(runs))
        print(f"{objective:12}{cells}", flush=True)
        harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
