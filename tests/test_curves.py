"""The picture of a run: what benchmarks/curves.py draws is what the run logged."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from training_scripts import SCRIPTS, Place

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("train_loss", "eval_loss", "eval_accuracy")


def draw(model_dir: Path, output: Path) -> ElementTree.Element:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "curves.py"),
        str(model_dir),
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return ElementTree.parse(output).getroot()


def logged(stderr: str) -> dict[str, np.ndarray]:
    """Steps and values of each scalar as the log has them, with five digits, [points, 2]."""
    found = {name: [] for name in NAMES}
    for step, values in re.findall(r"INFO Step (\d+): (.*)", stderr):
        for name, value in re.findall(r"(\w+) ([\d.e+-]+)", values):
            found.get(name, []).append((int(step), float(value)))
    return {name: np.array(points) for name, points in found.items() if points}


def curves(root: ElementTree.Element) -> dict[str, np.ndarray]:
    """Points of each curve on the page, [points, 2]."""
    paths = {name: root.find(f".//{SVG}g[@id='{name}']/{SVG}path") for name in NAMES}
    numbers = {
        name: re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))
        for name, path in paths.items()
        if path is not None
    }
    return {name: np.array(pairs, float) for name, pairs in numbers.items()}


def assert_on_one_scale(logged: np.ndarray, drawn: np.ndarray):
    """The page's coordinates are a linear function of the logged values, to a tenth of a point; upwards is less."""
    for column, sign in ((0, 1), (1, -1)):
        slope, start = np.polyfit(logged[:, column], drawn[:, column], 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(slope * logged[:, column] + start, drawn[:, column], atol=0.1)


@pytest.mark.parametrize("script", SCRIPTS[:2], ids=str)
def test_curves_are_what_was_logged(script, tmp_path):
    place = Place(script, tmp_path)
    run = place.run("out", max_steps=180, logging_steps=30, eval_steps=60)
    assert run.returncode == 0, run.stderr
    root = draw(tmp_path / "out", tmp_path / "curves.svg")
    values, drawn = logged(run.stderr), curves(root)
    assert (
        drawn.keys() == values.keys() == set(NAMES[: 3 if script is SCRIPTS[0] else 2])
    )  # clm has no accuracy
    assert (
        [len(values[name]) for name in NAMES[:2]]
        == [len(drawn[name]) for name in NAMES[:2]]
        == [6, 3]
    )
    assert_on_one_scale(
        *(np.concatenate([found["train_loss"], found["eval_loss"]]) for found in (values, drawn))
    )
    if "eval_accuracy" in drawn:
        assert_on_one_scale(values["eval_accuracy"], drawn["eval_accuracy"])
    text = [" ".join("".join(element.itertext()).split()) for element in root.iter(f"{SVG}text")]
    assert f"train {values['train_loss'][-1, 1]:.2f}" in text
    first = (tmp_path / "curves.svg").read_bytes()
    draw(tmp_path / "out", tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_bytes() == first


def test_the_readmes_picture():
    """It is a drawing of the numbers that the text beside it gives."""
    picture, readme = (
        ROOT / "docs" / "quickstart.svg",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    assert picture.stat().st_size < 60_000
    root = ElementTree.parse(picture).getroot()
    (section,) = re.findall(r"(?ms)^## Two commands to begin with$(.*?)^## ", readme)
    labels = [" ".join("".join(element.itertext()).split()) for element in root.iter(f"{SVG}text")]
    for label in ("train 5.36", "eval 5.51", "17.2%"):
        assert label in labels
        assert label.split()[-1] in section
    assert {name: len(points) for name, points in curves(root).items()} == dict(
        zip(NAMES, (20, 8, 8), strict=True)
    )
