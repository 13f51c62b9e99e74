"""Readers of what a run writes, independent of the scripts' own code."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from training_scripts import checkpoints

EXPORTED = ("config.json", "flax_model.msgpack", "model.safetensors", "tokenizer.json")


def state_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return all leaves of a checkpoint by name, read without the script's code."""
    return load_file(checkpoint / "state.safetensors")


def bits(state: dict[str, np.ndarray]) -> dict:
    """Return shape, dtype and bytes of each array, for a comparison bit by bit."""
    return {name: (value.shape, str(value.dtype), value.tobytes()) for name, value in state.items()}


def outcome(output_dir: Path) -> dict:
    """Return all results that must not depend on when a run was interrupted."""
    files = {name: (output_dir / name).read_bytes() for name in (*EXPORTED, "eval_results.json")}
    step = checkpoints(output_dir)[-1]
    state = state_of(output_dir / "checkpoints" / str(step))
    return {**files, "checkpoint": step, **bits(state)}


def differing(a: dict, b: dict) -> list[str]:
    """Return the names of the entries that are not the same in both."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def logged_steps(output_dir: Path) -> list[int]:
    """Return the steps that have a train_loss in TensorBoard, in the order of writing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = []
    paths = output_dir.glob("events.out.tfevents.*")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
        if "train_loss" in events.Tags()["tensors"]:
            steps += [event.step for event in events.Tensors("train_loss")]
    return steps


def losses(output_dir: Path) -> dict[int, float]:
    """Return {step: training loss} from TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    values = {}
    # A later file has the last value of a step that was taken twice.
    paths = output_dir.glob("events.out.tfevents.*")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
        if "train_loss" in events.Tags()["tensors"]:
            for event in events.Tensors("train_loss"):
                values[event.step] = float(make_ndarray(event.tensor_proto))
    return values


def evaluation(output_dir: Path) -> dict[str, float]:
    return json.loads((output_dir / "eval_results.json").read_text())


def check_whole_file(path: Path):
    """Check that a file of an output directory is complete if its name is that of a result."""
    from flax import serialization
    from safetensors.numpy import load_file

    if path.name.startswith((".tmp", "events.out.tfevents.")) or path.suffix == ".tmp":
        return
    if path.suffix == ".json":
        assert json.loads(path.read_text()), path
    elif path.suffix == ".safetensors":
        assert all(np.isfinite(value).all() for value in load_file(path).values())
    elif path.suffix == ".msgpack":
        assert serialization.msgpack_restore(path.read_bytes())
    else:
        names = (
            ".lock",
            "SHA256SUMS",
            "checkpoints",
            "vocab.txt",
            "vocab.json",
            "merges.txt",
            "spiece.model",
        )
        assert path.name in names, path


def check_whole(output_dir: Path):
    """Check that all files with the name of a result, and the last checkpoint, are complete."""
    if not output_dir.exists():
        return
    for path in output_dir.iterdir():
        check_whole_file(path)
    for path in (output_dir / "checkpoints").glob("*"):
        assert path.name.isdigit() or "tmp" in path.name, path
    steps = checkpoints(output_dir)
    if steps:
        state_of(output_dir / "checkpoints" / str(steps[-1]))
