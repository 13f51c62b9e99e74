"""A trace of some steps, which TensorBoard's profile plugin reads from plugins/profile/TIME."""

import gzip
import json
from pathlib import Path

import pytest
from training_scripts import Place, template_alone

pytestmark = template_alone


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("profile"))


def traced_steps(output_dir: Path) -> list[int]:
    """The numbers of the steps in the trace."""
    (folder,) = (output_dir / "profile" / "plugins" / "profile").iterdir()
    assert list(folder.glob("*.xplane.pb"))
    (path,) = folder.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    return sorted(int(step) for step in steps)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({"max_steps": 5}, [2, 3], id="within training"),
        pytest.param({"max_steps": 2}, [2], id="training ends before", marks=pytest.mark.full),
    ],
)
def test_a_trace_of_the_steps(place, options, steps):
    name = f"steps{options['max_steps']}"
    run = place.run(name, do_train=True, profile_steps="2:3", **options)
    assert (run.returncode, run.lines) == (0, [])
    assert "--profile_steps: the trace is written" in run.stderr
    assert traced_steps(place.directory / name) == steps
    run = place.run(f"{name} without", do_train=True, **options)
    models = [
        place.directory / folder / "flax_model.msgpack" for folder in (name, f"{name} without")
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_steps_count_from_the_start_of_training_when_a_run_resumes(place):
    place.run("resumed", do_train=True, max_steps=2)
    run = place.run("resumed", do_train=True, max_steps=4, profile_steps="4:9")
    assert (run.returncode, run.lines) == (0, [])
    assert traced_steps(place.directory / "resumed") == [4]


def test_steps_that_are_not_taken(place):
    run = place.run("outside", do_train=True, max_steps=2, profile_steps="3:4")
    assert run.returncode == 0
    (line,) = run.lines
    assert "--profile_steps 3:4: no trace, this run takes the steps 1 to 2" in line
    assert not (place.directory / "outside" / "profile").exists()
