"""What benchmarks/curves.py draws is what the run logged."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from training_scripts import SCRIPTS, Place, full_but

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("train_loss", "eval_loss", "eval_accuracy")


def draw(model_dir: Path, output: Path) -> ElementTree.Element:
    """Draw a run's curves by the command, and return the root of the SVG.

    The command prints nothing.
    """
    program = str(ROOT / "benchmarks" / "curves.py")
    command = [
        sys.executable,
        program,
        str(model_dir),
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return ElementTree.parse(output).getroot()


def logged_curves(stderr: str) -> dict[str, np.ndarray]:
    """Steps and values of each scalar as the log has them, with five digits, [points, 2]."""
    found = {name: [] for name in NAMES}
    for step, values in re.findall(r"INFO Step (\d+): (.*)", stderr):
        for name, value in re.findall(r"(\w+) ([\d.e+-]+)", values):
            if name in NAMES:
                point = (int(step), float(value))
                found[name].append(point)
    return {name: np.array(points) for name, points in found.items() if points}


def drawn_curves(root: ElementTree.Element) -> dict[str, np.ndarray]:
    """Points of each curve on the page, [points, 2]."""
    found = {}
    for name in NAMES:
        # A curve is a group with one path.
        path = root.find(f".//{SVG}g[@id='{name}']/{SVG}path")
        if path is not None:
            pairs = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))
            found[name] = np.array(pairs, float)
    return found


def labels_of(root: ElementTree.Element) -> list[str]:
    """All texts on the page, with single spaces."""
    labels = []
    for element in root.iter(f"{SVG}text"):
        text = "".join(element.itertext())
        labels.append(" ".join(text.split()))
    return labels


def assert_on_one_scale(logged: np.ndarray, drawn: np.ndarray):
    """The page's coordinates are linear in the logged values, to a tenth of a point.

    On a page, y decreases upwards.
    """
    for column, sign in ((0, 1), (1, -1)):
        values = logged[:, column]
        coordinates = drawn[:, column]
        slope, start = np.polyfit(values, coordinates, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(slope * values + start, coordinates, atol=0.1)


@pytest.mark.parametrize("script", full_but(SCRIPTS[:2], SCRIPTS[0]), ids=str)
def test_curves_are_what_was_logged(script, tmp_path):
    # With these settings the accuracy changes from one evaluation to the next.
    place = Place(script, tmp_path, dropout=False)
    run = place.run("out", max_steps=180, logging_steps=30, eval_steps=60, learning_rate=0.003)
    assert run.returncode == 0, run.stderr
    picture = tmp_path / "curves.svg"
    root = draw(tmp_path / "out", picture)
    logged = logged_curves(run.stderr)
    drawn = drawn_curves(root)

    # run_clm_flax.py measures no accuracy.
    has_accuracy = script is SCRIPTS[0]
    expected_names = set(NAMES if has_accuracy else NAMES[:2])
    assert drawn.keys() == logged.keys() == expected_names
    for curves in (logged, drawn):
        assert len(curves["train_loss"]) == 6
        assert len(curves["eval_loss"]) == 3
    # Both losses are in one panel.
    logged_losses = np.concatenate([logged["train_loss"], logged["eval_loss"]])
    drawn_losses = np.concatenate([drawn["train_loss"], drawn["eval_loss"]])
    assert_on_one_scale(logged_losses, drawn_losses)
    if has_accuracy:
        assert_on_one_scale(logged["eval_accuracy"], drawn["eval_accuracy"])
    last_loss = logged["train_loss"][-1, 1]
    assert f"train {last_loss:.2f}" in labels_of(root)

    # Drawing again gives the same bytes.
    first = picture.read_bytes()
    draw(tmp_path / "out", picture)
    assert picture.read_bytes() == first


def test_the_readmes_picture():
    """The picture shows the numbers that the text beside it gives."""
    picture = ROOT / "docs" / "quickstart.svg"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert picture.stat().st_size < 60_000
    root = ElementTree.parse(picture).getroot()
    (section,) = re.findall(r"(?ms)^## Quickstart$(.*?)^## ", readme)
    labels = labels_of(root)
    for label in ("train 4.91", "eval 5.05", "20.6%"):
        assert label in labels
        assert label.split()[-1] in section
    drawn = drawn_curves(root)
    num_points = {name: len(points) for name, points in drawn.items()}
    assert num_points == {
        "train_loss": 25,
        "eval_loss": 5,
        "eval_accuracy": 5,
    }
