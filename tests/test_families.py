"""Every family of models that a script trains: short runs that learn, whose export is read back, in both layouts.

python tests/test_families.py    writes the table of the README
"""

import json
from pathlib import Path

import pytest
import test_clm_objective
import test_mlm_objective
import test_t5_objective
from test_hosts import losses
from training_scripts import SCRIPTS, Place, tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
STEPS = 24
FAMILIES = {  # by the name that Transformers has for a configuration; after a comma, which kind of the family
    "run_mlm_flax.py": test_mlm_objective.FAMILIES,
    "run_mlm_flax_stream.py": test_mlm_objective.FAMILIES,
    "run_clm_flax.py": {**test_clm_objective.FAMILIES, "gpt-sw3": test_clm_objective.FAMILIES["gpt2"]},
    "run_t5_mlm_flax.py": test_t5_objective.FAMILIES,
    "run_bart_dlm_flax.py": dict.fromkeys(("bart", "mbart"), test_mlm_objective.SEQ2SEQ),
}
CASES = [(script, family) for script in SCRIPTS for family in FAMILIES[script.name]]


def make_place(directory: Path, script, family: str) -> Place:
    """With the configuration of a tiny model, its dropout as the family has it."""
    place = Place(script, directory)
    settings = {name: value for name, value in FAMILIES[script.name][family].items() if "drop" not in name}
    tiny_model(family.partition(",")[0], script.num_sentinels, **settings)(place.model)
    return place


@pytest.mark.parametrize(("script", "family"), CASES, ids=str)
def test_family(tmp_path, script, family):
    place = make_place(tmp_path, script, family)
    flags = {"model_type": family.partition(",")[0], "logging_steps": 1, "max_steps": STEPS, "learning_rate": 0.003}
    run = place.run("trained", **flags)
    assert (run.returncode, run.lines) == (0, [])  # no library's warning, either
    trained = place.directory / "trained"
    found = losses(trained)
    assert len(found) == STEPS
    start, end = (sum(found[step] for step in steps) / 4 for steps in (range(1, 5), range(STEPS - 3, STEPS + 1)))
    assert end < start - 0.05, found
    expected = (trained / "eval_results.json").read_bytes()
    assert end - 1 < json.loads(expected)["eval_loss"] < start

    for name in ("flax_model.msgpack", "model.safetensors"):  # most models on the Hub have the latter alone
        folder = place.directory / name.partition(".")[0]
        folder.mkdir()
        for path in trained.iterdir():
            if path.name == name or (path.suffix == ".json" and "results" not in path.name):
                (folder / path.name).write_bytes(path.read_bytes())
        read = {"model_name_or_path": folder, "model_type": None, "config_name": None, "tokenizer_name": None}
        run = place.run(f"from_{folder.name}", **read, do_eval=True, train_file=None, learning_rate=None)
        assert (run.returncode, run.lines) == (0, [])
        assert (place.directory / f"from_{folder.name}" / "eval_results.json").read_bytes() == expected
