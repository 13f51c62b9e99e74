#!/usr/bin/env python
"""Disturb a run of run_mlm_flax.py for half an hour, and compare it with an undisturbed run.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--json FILE]

The model is tiny. At random, from a seed that is printed, the run is killed, stopped by SIGTERM,
SIGHUP or Ctrl-C, started twice at once, left alone until it ends, its disk is filled and freed, or
a bit of its newest checkpoint is flipped. Each time it is started again with the same command.
Whenever it ends, and at the end, its weights, its optimizer's state and its evaluation must be
those of the undisturbed run, bit for bit. Then the next run begins.

The disk is a file system in memory, which only root can mount. Without root it is never full.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from outputs import differing, outcome
from training_scripts import TEMPLATE, Place, checkpoints

TRAINING = {
    "max_steps": 2000,
    "save_steps": 25,
    "save_total_limit": 4,
    "logging_steps": 20,
    "eval_steps": 300,
}
ACTIONS = ("kill", "stop", "two runs", "full disk", "damage", "leave alone")
WEIGHTS = (4, 4, 2, 2, 3, 1)
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Soak:
    """A run that is disturbed, the expected outcome, and counts of what has happened."""

    def __init__(self, directory: Path, disk: Path | None, rng: random.Random):
        self.rng = rng
        self.disk = disk
        self.place = Place(TEMPLATE, directory)
        self.output_dir = (disk or directory) / "run"
        self.counts = Counter()
        self.is_damaged = False
        run = self.place.run(directory / "undisturbed", **TRAINING)
        self.check(run.returncode == 0, run)
        self.expected = outcome(directory / "undisturbed")

    def check(self, holds: bool, run) -> None:
        """End with an error that shows the run's messages if something does not hold."""
        if not holds:
            raise SystemExit(f"FAILED after {dict(self.counts)}: {run.returncode}\n{run.stderr}")

    def start(self):
        self.is_damaged = False
        self.counts["starts"] += 1
        return self.place.start(self.output_dir, **TRAINING)

    def disturb(self) -> None:
        """Do one thing at random, and begin the next run if this one has ended."""
        action = self.rng.choices(ACTIONS, WEIGHTS)[0]
        can_damage = len(checkpoints(self.output_dir)) > 1 and not self.is_damaged
        if (action == "damage" and not can_damage) or (action == "full disk" and not self.disk):
            action = "kill"
        self.counts[action] += 1
        if action == "damage":
            self.damage()
            return
        run = self.start()
        if action != "leave alone":
            time.sleep(self.rng.uniform(0, 4))
        if action == "kill":
            run.kill()
        elif action == "stop":
            number = self.rng.choice(SIGNALS)
            run.send_signal(number)
            run.wait()
            self.check(run.returncode in (0, 128 + number) and not run.lines[1:], run)
        elif action == "two runs":
            self.start_second(run)
        elif action == "full disk":
            self.fill_disk(run)
        if run.wait().returncode == 0:
            self.finish(run)

    def damage(self) -> None:
        """Flip a bit of the newest checkpoint."""
        newest = self.output_dir / "checkpoints" / str(checkpoints(self.output_dir)[-1])
        path = self.rng.choice(sorted(newest.iterdir()))
        content = bytearray(path.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        self.is_damaged = True

    def start_second(self, first) -> None:
        """Start the same command while it runs: it must be refused.

        A warning may come before: the first run deletes a checkpoint that the second one reads.
        """
        second = self.start().wait()
        if first.poll() is None:
            self.check(second.returncode == 1 and "writes to it" in second.lines[-1], second)
            self.counts["second runs refused"] += 1
        elif first.returncode != 0 and second.returncode == 0:
            # The second one was first to take the lock.
            self.finish(second)
        first.kill()

    def fill_disk(self, run) -> None:
        """Leave no room on the disk until the run ends, and then free it."""
        usage = os.statvfs(self.disk)
        free = self.rng.choice((0, 4096, 100_000))
        filler = self.disk / "filler"
        # It fails if the run has written in the meantime.
        with suppress(OSError):
            filler.write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - free)))
        run.wait()
        filler.unlink(missing_ok=True)
        self.check(run.returncode in (0, 1), run)

    def finish(self, run) -> None:
        """Compare a run that has ended with the undisturbed one, and begin the next one."""
        different = differing(outcome(self.output_dir), self.expected)
        self.check(different == [], run)
        self.counts["runs that ended, bit for bit the same"] += 1
        shutil.rmtree(self.output_dir)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.minutes} minutes", flush=True)

    with tempfile.TemporaryDirectory() as name:
        disk = Path(name) / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        try:
            directory = Path(name) / "runs"
            directory.mkdir()
            soak = Soak(directory, disk if is_mounted else None, random.Random(args.seed))
            end = time.monotonic() + 60 * args.minutes
            while time.monotonic() < end:
                soak.disturb()
            last = soak.start().wait()
            soak.check(last.returncode == 0, last)
            soak.finish(last)
        finally:
            if is_mounted:
                # Lazily: after an error a run may still use it.
                subprocess.run(["umount", "--lazy", str(disk)], check=False)

    for what, count in soak.counts.items():
        print(f"{count:6} {what}")
    if args.json:
        args.json.write_text(json.dumps(soak.counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
