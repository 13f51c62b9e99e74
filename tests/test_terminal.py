"""The output of a run: progress bars at a terminal, whole lines in a file."""

import re
import sys

from training_scripts import Place, child_environment, run_at_terminal, template_alone

# The start of a progress bar of tqdm.
BAR = re.compile(r"\d+%\|")


def test_no_progress_bars_in_a_file(script, tmp_path):
    run = Place(script, tmp_path).run("out", max_steps=2, preprocessing_num_workers=2, save_steps=1)
    assert run.returncode == 0, run.stderr
    # All lines of stderr are log lines.
    assert run.lines == []
    assert "Step 2: train_loss" in run.stderr
    assert run.stdout == ""
    assert "\r" not in run.stderr
    assert not BAR.search(run.stderr)


@template_alone
def test_progress_bars_at_a_terminal(script, tmp_path):
    """There are bars while texts are tokenized, so the test above can fail."""
    place = Place(script, tmp_path)
    command = [sys.executable, str(script.path), *place.flags("out", max_steps=1)]
    shown = run_at_terminal(command, env=child_environment())
    assert re.search(r"\rtrain.*\d+%\|", shown.decode())
