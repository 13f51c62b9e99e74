"""The checkpoint with the lowest eval_loss is kept, exported and evaluated at the end.

The losses of some evaluations are replaced by planned ones, so that the best one is known.
"""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from training_scripts import (
    SCRIPTS,
    STREAM,
    TEMPLATE,
    Place,
    checkpoints,
    full_but,
    template_alone,
)


def plan_losses(script):
    """Replace eval_loss by what PLAN has for the step. Runs in the process of the script."""
    import json
    import os

    plan = json.loads(os.environ["PLAN"])
    evaluate = script.evaluate

    def planned(*args):
        results = evaluate(*args)
        loss = plan.get(str(args[-1]))
        if results and loss is not None:
            results["eval_loss"] = float(loss)
        return results

    script.evaluate = planned


# The best evaluation is neither the last one nor among the newest checkpoints.
PLAN = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
FLAGS = {
    "load_best_model_at_end": True,
    "max_steps": 8,
    "eval_steps": 2,
    "save_steps": 3,
    "save_total_limit": 1,
    "max_eval_samples": 16,
    "lr_scheduler_type": "constant",
}


def start(place: Place, output_dir, plan: dict = PLAN, **options):
    env = {"PLAN": json.dumps({step: str(loss) for step, loss in plan.items()})}
    return place.start(output_dir, change=plan_losses, env=env, **{**FLAGS, **options})


def succeed(run):
    run.wait()
    assert (run.returncode, run.lines) == (0, [])
    return run


def exported_step(output_dir: Path) -> list[int]:
    """The checkpoints whose weights are those of the exported model."""
    model = serialization.msgpack_restore((output_dir / "flax_model.msgpack").read_bytes())
    exported = {"/".join(("params", *path)): leaf for path, leaf in flatten_dict(model).items()}
    found = []
    for step in checkpoints(output_dir):
        state = load_file(output_dir / "checkpoints" / str(step) / "state.safetensors")
        if all(np.array_equal(state[name], leaf) for name, leaf in exported.items()):
            found.append(step)
    return found


def best_of(output_dir: Path, step: int) -> dict:
    run = json.loads((output_dir / "checkpoints" / str(step) / "run.json").read_text())
    return run["settings"]["best"]


def results_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "eval_results.json").read_text())


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Place:
    return Place(script, tmp_path_factory.mktemp("best"))


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    run = succeed(start(place, "undisturbed"))
    assert "Exported step 4, the best, with eval_loss 1." in run.stderr
    return place.directory / "undisturbed"


@pytest.fixture
def output_dir(place, request):
    path = place.directory / request.node.name.replace("/", "_").replace("[", "-").rstrip("]")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE, STREAM), ids=str, indirect=True)
def test_the_best_is_kept_exported_and_evaluated(place, undisturbed, output_dir):
    assert checkpoints(undisturbed) == [4, 8]
    assert exported_step(undisturbed) == [4]
    best = {"step": 4, "eval_loss": 1.0, "evaluated": 8, "without_improvement": 2}
    assert best_of(undisturbed, 8) == best
    assert results_of(undisturbed)["eval_loss"] == 1.0

    # An evaluation of the exported model alone.
    shutil.copytree(undisturbed, output_dir)
    run = place.run(output_dir, do_eval=True, max_eval_samples=16)
    assert (run.returncode, run.lines) == (0, [])
    perplexity = results_of(output_dir)["eval_perplexity"]
    assert perplexity == results_of(undisturbed)["eval_perplexity"]


@template_alone
def test_the_same_command_again_trains_no_step(place, undisturbed, output_dir):
    shutil.copytree(undisturbed, output_dir)
    (output_dir / "flax_model.msgpack").unlink()
    succeed(start(place, output_dir))
    assert checkpoints(output_dir) == [4, 8]
    assert exported_step(output_dir) == [4]


SAVED = r"^rename .*/checkpoints/\d+$"
EXPORTED = r"^rename .*/flax_model\.msgpack$"
# Checkpoints are saved after the steps 2, 3, 4, 6 and 8.
KILLS = {
    "after the best is saved": ([SAVED] * 4, signal.SIGKILL),
    "while an older best is removed": ([SAVED, SAVED, SAVED, "^remove "], signal.SIGKILL),
    "before the last export": ([*[SAVED] * 5, EXPORTED], signal.SIGKILL),
    "in the export of the best": ([*[SAVED] * 5, EXPORTED, EXPORTED], signal.SIGKILL),
    "by a signal after the best is saved": ([SAVED] * 4, signal.SIGTERM),
}


@template_alone
@pytest.mark.parametrize(
    "moment",
    full_but(KILLS, "while an older best is removed", "in the export of the best"),
)
def test_a_stopped_run_ends_as_an_undisturbed_one(place, undisturbed, output_dir, moment):
    patterns, number = KILLS[moment]
    run = start(place, output_dir, kill_at=patterns, kill_with=number).wait()
    assert run.returncode == 128 + number, run.stderr
    succeed(start(place, output_dir))
    assert checkpoints(output_dir) == checkpoints(undisturbed)
    for name in ("flax_model.msgpack", "eval_results.json"):
        assert (output_dir / name).read_bytes() == (undisturbed / name).read_bytes()
    # A signal may arrive in the last step. Its evaluation is then made by the second run, which
    # finds the checkpoint written and does not add the result to it.
    found = best_of(output_dir, 8)
    expected = best_of(undisturbed, 8)
    if number == signal.SIGKILL:
        assert found == expected
    for key in ("step", "eval_loss"):
        assert found[key] == expected[key]


def stop_in_evaluation(script):
    """Let the first evaluation at step 4 be stopped by SIGTERM, and plan the losses."""
    import json
    import os
    import signal

    plan = json.loads(os.environ["PLAN"])
    evaluate = script.evaluate

    def stopped(*args):
        step = args[-1]
        if step == 4 and "stop" in os.environ["HOW"]:
            os.kill(os.getpid(), signal.SIGTERM)
        results = evaluate(*args)
        if results and str(step) in plan:
            results["eval_loss"] = float(plan[str(step)])
        return results

    script.evaluate = stopped


@template_alone
def test_an_evaluation_that_a_signal_stops_is_done_by_the_resumed_run(
    place, undisturbed, output_dir
):
    env = {"PLAN": json.dumps({step: str(loss) for step, loss in PLAN.items()})}
    options = {**FLAGS, "change": stop_in_evaluation}
    run = place.run(output_dir, env={**env, "HOW": "stop"}, **options)
    assert run.returncode == 128 + signal.SIGTERM, run.stderr
    assert checkpoints(output_dir)[-1] == 4
    assert best_of(output_dir, 4)["step"] == 2
    succeed(place.start(output_dir, env={**env, "HOW": "resume"}, **options))
    assert checkpoints(output_dir) == [4, 8]
    assert exported_step(output_dir) == [4]
    assert best_of(output_dir, 8) == best_of(undisturbed, 8)


@template_alone
def test_patience(place, output_dir):
    plan = {2: 2.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 0.5}
    flags = {"early_stopping_patience": 2, "max_steps": 12}
    run = succeed(start(place, output_dir, plan, **flags))
    assert "--early_stopping_patience: training ends after step 8" in run.stderr
    assert checkpoints(output_dir) == [4, 8]
    assert exported_step(output_dir) == [4]
    model = (output_dir / "flax_model.msgpack").read_bytes()

    # It has ended for good, unless there is more patience.
    succeed(start(place, output_dir, plan, **flags))
    assert checkpoints(output_dir) == [4, 8]
    assert (output_dir / "flax_model.msgpack").read_bytes() == model
    flags["early_stopping_patience"] = 3
    run = succeed(start(place, output_dir, plan, **flags))
    assert "--early_stopping_patience is 3 now, and was 2 before" in run.stderr
    assert checkpoints(output_dir) == [10, 12]
    assert exported_step(output_dir) == [10]


@template_alone
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_infinity_are_never_the_best(place, output_dir, number):
    plan = {2: number, 4: 7.0, 6: number, 8: number}
    succeed(start(place, output_dir, plan))
    assert exported_step(output_dir) == [4]
    assert best_of(output_dir, 8)["eval_loss"] == 7.0


@template_alone
def test_no_finite_loss_at_all(place, output_dir):
    run = start(place, output_dir, dict.fromkeys(PLAN, math.nan)).wait()
    assert run.returncode == 0
    (line,) = run.lines
    assert "No evaluation had a finite loss" in line
    assert exported_step(output_dir) == [8]


@template_alone
def test_a_best_checkpoint_that_is_gone_or_damaged(place, undisturbed, output_dir):
    shutil.copytree(undisturbed, output_dir)
    state = output_dir / "checkpoints" / "4" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    run = start(place, output_dir).wait()
    assert run.returncode == 1
    assert "checkpoints/4: the best checkpoint cannot be read" in run.lines[-1]
    shutil.rmtree(output_dir / "checkpoints" / "4")
    run = start(place, output_dir, max_steps=10).wait()
    assert run.returncode == 0, run.stderr
    (line,) = run.lines
    assert "checkpoints/4, the best one, is missing" in line
    assert exported_step(output_dir) == [8]
