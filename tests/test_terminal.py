"""What a run prints: progress bars for a person at a terminal, whole lines for a file."""

import re
import sys

from training_scripts import Place, child_environment, run_at_terminal, template_alone

BAR = re.compile(r"\d+%\|")  # as tqdm draws it


def test_no_progress_bars_in_a_file(script, tmp_path):
    run = Place(script, tmp_path).run("out", max_steps=2, preprocessing_num_workers=2, save_steps=1)
    assert run.returncode == 0, run.stderr
    assert run.lines == []  # all of it is log
    assert "Step 2: train_loss" in run.stderr
    assert run.stdout == ""
    assert "\r" not in run.stderr
    assert not BAR.search(run.stderr)


@template_alone
def test_progress_bars_at_a_terminal(script, tmp_path):
    """So the test above can fail: the texts take a while to be tokenized, and a person sees how far it has come."""
    place = Place(script, tmp_path)
    command = [sys.executable, str(script.path), *place.flags("out", max_steps=1)]
    shown = run_at_terminal(command, env=child_environment())
    assert re.search(r"\rtrain.*\d+%\|", shown.decode())
