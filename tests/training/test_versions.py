"""Checkpoints and weights of one set of versions are read by another one, in both directions.

OTHER_PYTHON names the Python of the other set. `make test-oldest` sets it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_scripts import SCRIPTS, TEMPLATE, Place, checkpoints, child_environment, full_but

OTHER = os.environ.get("OTHER_PYTHON")
STEPS = {"max_steps": 8, "save_steps": 4, "logging_steps": 1}
pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(not OTHER, reason="OTHER_PYTHON names no other environment"),
]


def run(python: str, place: Place, output_dir: str, **changes) -> str:
    """Run the script, which may print nothing but log lines. Return its log."""
    command = [python, str(place.script.path), *place.flags(output_dir, **changes)]
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(command, env=child_environment(), cwd=place.directory, **options)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if " INFO " not in line] == []
    return done.stderr


def results(output_dir: Path) -> dict:
    return json.loads((output_dir / "all_results.json").read_text())


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE), ids=str, indirect=True)
@pytest.mark.parametrize("other_first", [False, True])
def test_checkpoints_and_weights_of_another_set(tmp_path, script, other_first):
    """A run that is resumed at step 4 ends as the undisturbed run did, up to rounding.

    The exported weights are read, too.
    """
    place = Place(script, tmp_path)
    pythons = [sys.executable, OTHER]
    if other_first:
        pythons.reverse()
    one, two = pythons
    assert "steps 0 to 8" in run(one, place, "one", **STEPS)
    whole = tmp_path / "one"
    shutil.copytree(whole, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "8")
    for path in (tmp_path / "two").iterdir():
        if path.is_file():
            path.unlink()
    assert "steps 4 to 8" in run(two, place, "two", **STEPS)
    assert checkpoints(tmp_path / "two") == [4, 8]
    for name, value in results(whole).items():
        if "time" not in name and "second" not in name:
            assert results(tmp_path / "two")[name] == pytest.approx(value, rel=0.01), name

    weights = ("flax_model.msgpack", "model.safetensors")
    not_exported = shutil.ignore_patterns("checkpoints", "*_results.json", "events.*")
    for kept in weights:
        folder = tmp_path / kept.partition(".")[0]
        shutil.copytree(whole, folder, ignore=not_exported)
        for name in weights:
            if name != kept:
                (folder / name).unlink()
        read = {
            "model_name_or_path": folder,
            "config_name": None,
            "tokenizer_name": None,
            "train_file": None,
        }
        run(two, place, f"read_{kept}", **read, do_eval=True)
        found = results(tmp_path / f"read_{kept}")["eval_loss"]
        assert found == pytest.approx(results(whole)["eval_loss"], rel=1e-4)
