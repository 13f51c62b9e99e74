"""The output of a run: progress bars at a terminal, whole lines in a file."""

import re
import sys

import pytest
from training_scripts import (
    SCRIPTS,
    STREAM,
    TEMPLATE,
    Place,
    child_environment,
    full_but,
    run_at_terminal,
    template_alone,
)

# The start of a progress bar of tqdm.
BAR = re.compile(r"\d+%\|")


@pytest.mark.parametrize("script", full_but(SCRIPTS, TEMPLATE, STREAM), ids=str, indirect=True)
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
    """There are bars for tokenizing, training and evaluation, and whole log lines."""
    place = Place(script, tmp_path)
    command = [sys.executable, str(script.path), *place.flags("out", max_steps=1)]
    shown = run_at_terminal(command, env=child_environment())
    text = shown.decode()
    for description in ("Tokenizing training text", "Training", "Evaluating"):
        assert re.search(rf"\r{description}:?.*\d+%\|", text), description
    # A log line begins at the left edge, after a line break or after the place of a bar.
    log_lines = re.findall(r"(?m)(?:^|\r)(\d\d:\d\d:\d\d INFO [^\r\n]*)\r?$", text)
    assert len(log_lines) == text.count(" INFO ")
    assert any("Step 1: train_loss" in line for line in log_lines)
    assert any("Step 1: eval_loss" in line for line in log_lines)
