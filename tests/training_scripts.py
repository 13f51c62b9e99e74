"""The training scripts under test, and processes that run them. A new script needs one entry in SCRIPTS.

A process of its own costs each run two seconds of imports. So the scripts are imported once, in a server that forks a
child for each run: the child is a process like any other, with its own devices, exit status, signals and file
descriptors, and may be killed at any moment, also at one named by a file operation (`kill_at`).
"""

import contextlib
import fcntl
import gc
import importlib.util
import inspect
import json
import os
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_WORDS = 60
LENGTH = 32
NUM_SENTINELS = 8


# --------------------------------------------------------------------------------------------------- tiny models


def write_text(path: Path, lines: int, seed: int) -> Path:
    """Lines of 5 to 20 words, the frequent ones first in the vocabulary."""
    rng = random.Random(seed)
    words = lambda: (
        f"w{min(NUM_WORDS - 1, int(rng.expovariate(0.1)))}" for _ in range(rng.randint(5, 20))
    )  # noqa: E731
    path.write_text("".join(" ".join(words()) + "\n" for _ in range(lines)))
    return path


def word_tokenizer(
    directory: Path, without: tuple[str, ...] = (), num_words: int = NUM_WORDS, sentinels: int = 0
):
    """One token a word, `<s> ... </s>` around each text, as a fast tokenizer; `without` some special tokens, and with
    `sentinels` in the manner of T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(num_words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    named = {f"{name}_token": word for name, word in special.items() if name not in without}
    if sentinels:
        named["additional_special_tokens"] = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **named)
    fast.save_pretrained(directory)
    return fast


def tiny_model(model_type: str, sentinels: int = 0, **settings):
    """Function that writes a tokenizer and the configuration of a model of one layer, with dropout, so that its random
    numbers count: (directory, **changes of the configuration) -> None."""

    def write(directory: Path, **changes):
        from transformers import CONFIG_MAPPING

        tokenizer = word_tokenizer(directory, sentinels=sentinels)
        special = {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "pad_token_id", "eos_token_id")
        }
        values = {"vocab_size": len(tokenizer), **special, **settings, **changes}
        CONFIG_MAPPING[model_type](**values).save_pretrained(directory)

    return write


# -------------------------------------------------------------------------------------------------------- scripts


def run_at_terminal(command: list[str], **options) -> bytes:
    """What a person sees of a command that succeeds, at a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0)
    )  # else it has no columns, and bars none
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, **options
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while more := os.read(ours, 4096):
                shown += more
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    return shown


@dataclass(frozen=True)
class Script:
    name: str
    model_type: str
    other_model_type: str  # that the script knows, too
    write_model: Callable  # (directory, **changes of the config) -> None: tokenizer and config of a tiny model
    no_dropout: tuple[str, ...]  # the config's dropout rates, to be set to 0
    length_flag: str = "max_seq_length"
    width: str = "hidden_size"  # in its config
    modules: tuple[str, ...] = ()  # what a run imports late, for the fork server to import early
    flags: tuple[str, ...] = ()  # that it needs more than the others
    block: int = LENGTH  # tokens of text that a sequence of LENGTH takes
    num_sentinels: int = 0  # of its tokenizer
    needs_model_type: bool = True  # without a config; else it has a default
    has_positions: bool = True  # a table of them, which limits the length
    is_stream: bool = (
        False  # nothing of the data is stored, and each process has a part of it for itself
    )

    def __str__(self):
        return self.name

    @property
    def path(self) -> Path:
        return ROOT / self.name


SCRIPTS = [
    Script(
        "run_mlm_flax.py",
        model_type="roberta",
        other_model_type="bert",
        write_model=tiny_model(
            "roberta",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH + 2,  # positions start after the pad id, which is 1
            type_vocab_size=1,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        ),
        no_dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        modules=("transformers.models.roberta.modeling_flax_roberta",),
    ),
    Script(
        "run_clm_flax.py",
        model_type="gpt2",
        other_model_type="opt",
        write_model=tiny_model(
            "gpt2",
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=LENGTH,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        ),
        no_dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        length_flag="block_size",
        width="n_embd",
        modules=("transformers.models.gpt2.modeling_flax_gpt2",),
    ),
    Script(
        "run_t5_mlm_flax.py",
        model_type="t5",
        other_model_type="mt5",
        write_model=tiny_model(
            "t5",
            NUM_SENTINELS,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.1,
        ),
        no_dropout=("dropout_rate",),
        modules=(
            "transformers.models.t5.modeling_flax_t5",
            "transformers.models.longt5.modeling_flax_longt5",
        ),
        width="d_model",
        block=34,  # 5 of them in 2 spans: 29, 2 sentinels and eos
        num_sentinels=NUM_SENTINELS,
        has_positions=False,
    ),
    Script(
        "run_bart_dlm_flax.py",
        model_type="bart",
        other_model_type="mbart",
        write_model=tiny_model(
            "bart",
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=LENGTH,
            dropout=0.1,
            attention_dropout=0.1,
        ),
        no_dropout=("dropout", "attention_dropout", "activation_dropout"),
        modules=("transformers.models.bart.modeling_flax_bart",),
        width="d_model",
        needs_model_type=False,
    ),
]
TEMPLATE = SCRIPTS[0]
SCRIPTS.append(
    replace(
        TEMPLATE, name="run_mlm_flax_stream.py", flags=("--num_eval_samples=16",), is_stream=True
    )
)
# For tests of what the scripts have word for word in common, as test_copies.py makes sure.
template_alone = pytest.mark.only_where.with_args(lambda script, **others: script is TEMPLATE)


class Place:
    """A folder with all that a run needs, and the runs in it."""

    def __init__(self, script: Script, directory: Path, dropout: bool = True, **forking):
        self.script, self.directory, self.forking = script, directory, forking
        self.model = directory / "start"
        script.write_model(self.model, **({} if dropout else dict.fromkeys(script.no_dropout, 0.0)))
        self.train_file = write_text(directory / "train.txt", 400, seed=1)
        self.validation_file = write_text(directory / "validation.txt", 60, seed=2)

    def settings(self, output_dir) -> dict:
        """All that a short run needs."""
        return {
            "output_dir": output_dir and self.directory / output_dir,
            "model_type": self.script.model_type,
            "config_name": self.model,
            "tokenizer_name": self.model,
            "train_file": self.train_file,
            "validation_file": self.validation_file,
            self.script.length_flag: LENGTH,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.01,
        }

    def flags(self, output_dir, **changes) -> list[str]:
        """A whole command line; a flag of True is a switch, one of None or False is left out."""
        flags = {**self.settings(output_dir), **changes}
        given = {
            flag: value for flag, value in flags.items() if value is not None and value is not False
        }
        return [
            f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items()
        ]

    def start(self, output_dir, **options) -> "Run":
        """A run in the background, with flags, and with options of `ForkServer.start`."""
        forking = self.forking | {name: options.pop(name) for name in FORKING & options.keys()}
        return server(self.script).start(
            self.flags(output_dir, **options), self.directory, **forking
        )

    def start_argv(self, argv: list[str]) -> "Run":
        """A run in the background, with a command line as it is."""
        return server(self.script).start(argv, self.directory)

    def run(self, output_dir, **options) -> "Run":
        """A run to its end."""
        return self.start(output_dir, **options).wait()


# ------------------------------------------------------------------------------------------------ what a run leaves


def checkpoints(output_dir: Path) -> list[int]:
    """The steps that have one."""
    folder = output_dir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        if folder.exists()
        else []
    )


def snapshot(directory: Path) -> dict:
    """Names, sizes and times of all that is there."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


# ---------------------------------------------------------------------------------------------------- fork server

FORKING = {
    "devices",
    "env",
    "kill_at",
    "kill_with",
    "compiles",
    "file_limit",
    "optimized",
    "change",
}


class Run:
    """A child of the fork server."""

    def __init__(self, server, pid: int, streams: Path):
        self.server, self.pid, self.streams, self.returncode = server, pid, streams, None

    def poll(self) -> int | None:
        """Its exit status as a shell would see it, 128 + the signal if it died of one; None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120) -> "Run":
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.stderr}")
            time.sleep(0.01)
        return self

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    @property
    def stderr(self) -> str:
        return self.streams.with_suffix(".stderr").read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return self.streams.with_suffix(".stdout").read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """stderr without the log lines of a run in order: the errors and warnings, and whatever else is there."""
        return [
            line for line in self.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d INFO ", line)
        ]


class ForkServer:
    def __init__(self, script: Script, directory: Path):
        self.directory, self.count, self.lock = directory, 0, threading.Lock()
        command = [sys.executable, __file__, str(script.path), *script.modules]
        self.process = subprocess.Popen(
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(
        self, argv, cwd, devices=2, env=None, kill_at=(), kill_with=signal.SIGKILL, compiles=None, file_limit=None,
        optimized=False, change=None,
    ) -> Run:  # fmt: skip
        """Forks a child that runs `cli(argv)` on `devices` virtual CPU devices.

        `kill_at` is a list of regular expressions for file operations of Python, "open PATH", "mkdir PATH", "remove
        PATH", "rmdir PATH", "rename PATH PATH": when they have matched one after the other, the child sends itself
        `kill_with` before the last one is done. `compiles` is a file to write the names of the compiled functions to.
        `file_limit` is the largest size in bytes of a file that it may write. `optimized` programs take twice as long
        to compile. `change` is a function of the script's module that the child calls first, to slow something down or
        to watch it; only its source is sent, so it must be at the top level of a file and import what it uses.
        """
        self.count += 1
        streams = self.directory / f"run-{self.count}"
        request = {
            "argv": [str(argument) for argument in argv],
            "cwd": str(cwd),
            "env": {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                **(env or {}),
            },
            "streams": str(streams),
            "kill_at": list(kill_at),
            "kill_with": int(kill_with),
            "compiles": compiles and str(compiles),
            "file_limit": file_limit,
            "optimized": optimized,
            "change": change and (change.__name__, inspect.getsource(change)),
        }
        return Run(self, self.ask(**request), streams)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def child_environment(devices: int = 2, **changes) -> dict[str, str]:
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return {**os.environ, **flags, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", **changes}


@cache
def server(script: Script) -> ForkServer:
    """The script's server, started by the first test that needs it, ended with the session."""
    import atexit
    import tempfile

    directory = tempfile.TemporaryDirectory()
    started = ForkServer(script, Path(directory.name))
    atexit.register(lambda: (started.close(), directory.cleanup()))
    return started


def kill_self_at(patterns: list[str], number: int):
    """An audit hook that sends the process a signal when file operations have matched all of `patterns` in order."""
    left = [re.compile(pattern) for pattern in patterns]

    def hook(event, args):
        name = event.removeprefix("os.")
        if name not in ("open", "mkdir", "rename", "remove", "rmdir"):
            return
        if name == "open" and (len(args) < 3 or not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return  # to read
        words = [os.fspath(arg) for arg in args if isinstance(arg, (str, bytes, os.PathLike))]
        words = [os.fsdecode(word) for word in words][: 2 if name == "rename" else 1]
        if left and left[0].search(" ".join((name, *words))):
            left.pop(0)
            if not left:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def serve(path: str, modules: list[str]):
    """Reads requests, one JSON object a line, and answers each with one line; in a forked child, runs the script."""
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # children share the pages of what is imported as long as nothing writes to them
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    running = set()
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            if pid:
                running.discard(pid)
            code = os.waitstatus_to_exitcode(status) if pid else None
            answer = 128 - code if code is not None and code < 0 else code
        else:
            answer = os.fork()
            if answer == 0:
                break
            running.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    else:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return

    requests.close()
    answers.close()
    for descriptor, suffix in ((1, ".stdout"), (2, ".stderr")):
        file = os.open(request["streams"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    if request["kill_at"]:
        kill_self_at(request["kill_at"], request["kill_with"])
    if request["compiles"]:
        record_compiles(request["compiles"])
    if request["optimized"]:
        sys.modules["jax"].config.update("jax_disable_most_optimizations", False)
    if request["change"]:
        name, source = request["change"]
        exec(source, names := {})
        names[name](script)
    sys.argv = [path, *request["argv"]]
    sys.exit(script.cli(request["argv"]))


def record_compiles(path: str):
    """Appends the name of each function that XLA compiles or loads from the compilation cache to the file `path`."""
    import jax

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            with open(path, "a") as file:
                file.write(f"{kwargs.get('fun_name')}\n")

    jax.monitoring.register_event_duration_secs_listener(listener)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
