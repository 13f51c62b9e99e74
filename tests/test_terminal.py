"""What a run prints: progress bars for a person at a terminal, whole lines for a file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from training_scripts import Place, child_environment, template_alone

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
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # else it has no columns, and bars none
    with subprocess.Popen(command, env=child_environment(), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while more := os.read(ours, 4096):
                shown += more
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    assert re.search(r"\rtrain.*\d+%\|", shown.decode())
