"""The training scripts under test, and processes that run them.

A new script needs one entry in SCRIPTS.

The imports of a script take two seconds. So a server imports each script once and forks a child for
each run. The child is a process like any other: it has its own devices, exit status, signals and
file descriptors, and a test may kill it at any moment, or at a given file operation (`kill_at`).
"""

import atexit
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
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_WORDS = 60
LENGTH = 32
NUM_SENTINELS = 8


# ---------------------------------------------------------------------------------------
# Tiny models
# ---------------------------------------------------------------------------------------


def write_text(path: Path, lines: int, seed: int) -> Path:
    """Write lines of 5 to 20 words. Words with small numbers are the most frequent."""
    rng = random.Random(seed)
    text = ""
    for _ in range(lines):
        num_words = rng.randint(5, 20)
        numbers = [min(NUM_WORDS - 1, int(rng.expovariate(0.1))) for _ in range(num_words)]
        text += " ".join(f"w{number}" for number in numbers) + "\n"
    path.write_text(text)
    return path


def word_tokenizer(
    directory: Path, without: tuple[str, ...] = (), num_words: int = NUM_WORDS, sentinels: int = 0
):
    """Save and return a fast tokenizer with one token for each word.

    It puts `<s> ... </s>` around each text.

    Args:
        directory: where it is saved.
        without: special tokens that the tokenizer does not declare, such as "mask".
        num_words: number of words in the vocabulary, which are w0, w1 and so on.
        sentinels: number of sentinel tokens, which are named as T5's are.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    words = [*special.values(), *(f"w{number}" for number in range(num_words))]
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {f"{name}_token": word for name, word in special.items() if name not in without}
    if sentinels:
        names["additional_special_tokens"] = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **names)
    fast.save_pretrained(directory)
    return fast


def tiny_model(model_type: str, sentinels: int = 0, **settings):
    """Return a function that writes a tokenizer and the config of a model with these settings.

    The settings should describe a model of one layer with dropout, so that wrong random numbers
    show. The function takes the directory and, as keyword arguments, changes of the config.
    """

    def write(directory: Path, **changes):
        from transformers import CONFIG_MAPPING

        tokenizer = word_tokenizer(directory, sentinels=sentinels)
        values = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = CONFIG_MAPPING[model_type](**{**values, **settings, **changes})
        config.save_pretrained(directory)

    return write


# ---------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------


def run_at_terminal(command: list[str], **options) -> bytes:
    """Run a command that succeeds at a terminal of 80 columns, and return what is shown there."""
    terminal, child_end = pty.openpty()
    # A new terminal has no size, and progress bars would have no width.
    rows_and_columns = struct.pack("HHHH", 24, 80, 0, 0)
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, rows_and_columns)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=child_end, stderr=child_end, **options
    ) as process:
        os.close(child_end)
        shown = b""
        # Linux raises OSError once the other end is closed.
        with contextlib.suppress(OSError):
            while more := os.read(terminal, 4096):
                shown += more
    os.close(terminal)
    assert process.returncode == 0, shown
    return shown


@dataclass(frozen=True)
class Script:
    """What the tests need to know about a training script."""

    name: str
    model_type: str
    # Another model type that the script supports.
    other_model_type: str
    # (directory, **changes of the config): writes the tokenizer and config of a tiny model.
    write_model: Callable
    # Names of the dropout rates in the config.
    no_dropout: tuple[str, ...]
    length_flag: str = "max_seq_length"
    # Name of the model's width in the config.
    width: str = "hidden_size"
    # Modules that a run imports late. The fork server imports them before it forks.
    modules: tuple[str, ...] = ()
    # Flags that this script needs and the others do not.
    flags: tuple[str, ...] = ()
    # Number of tokens of text in a sequence of LENGTH tokens.
    block: int = LENGTH
    # Number of sentinel tokens in its tokenizer.
    num_sentinels: int = 0
    # Whether it needs --model_type if there is no config.
    needs_model_type: bool = True
    # Whether its model has a table of positions, which limits the length of a sequence.
    has_positions: bool = True
    # Whether it streams its data: nothing is stored, and each process reads a share of its own.
    is_stream: bool = False

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
            # Positions start after the pad id, which is 1.
            max_position_embeddings=LENGTH + 2,
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
        # Two spans hold 5 of the 34 tokens. The input is the other 29, 2 sentinels and eos.
        block=34,
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
STREAM = replace(
    TEMPLATE, name="run_mlm_flax_stream.py", flags=("--num_eval_samples=16",), is_stream=True
)
SCRIPTS.append(STREAM)
T5 = next(script for script in SCRIPTS if script.model_type == "t5")
# Marks tests of code that is word for word the same in all scripts, which test_copies.py verifies.
template_alone = pytest.mark.only_where.with_args(lambda script, **others: script is TEMPLATE)
other_scripts = pytest.mark.only_where.with_args(lambda script, **others: script is not TEMPLATE)


def full_but(cases: Iterable, *kept) -> list:
    """Parameters of a test. `make test` runs those that are kept, `make test-full` all of them."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if case in kept else pytest.mark.full))
    return found


class Place:
    """A folder with everything that runs of a script need, and with the runs themselves.

    Args:
        script: the script to run.
        directory: an existing folder, which is the working directory of the runs.
        dropout: whether the model has dropout.
        forking: options of `ForkServer.start` for every run.
    """

    def __init__(self, script: Script, directory: Path, dropout: bool = True, **forking):
        self.script = script
        self.directory = directory
        self.forking = forking
        self.model = directory / "start"
        changes = {} if dropout else dict.fromkeys(script.no_dropout, 0.0)
        script.write_model(self.model, **changes)
        self.train_file = write_text(directory / "train.txt", 400, seed=1)
        self.validation_file = write_text(directory / "validation.txt", 60, seed=2)

    def settings(self, output_dir) -> dict:
        """Return the flags of a short run, by name."""
        return {
            "output_dir": None if output_dir is None else self.directory / output_dir,
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
        """Return a whole command line.

        `changes` replace or add flags. True stands for a switch; None and False leave the flag out.
        """
        argv = []
        for flag, value in {**self.settings(output_dir), **changes}.items():
            if value is True:
                argv.append(f"--{flag}")
            elif value is not None and value is not False:
                argv.append(f"--{flag}={value}")
        return argv

    def start(self, output_dir, **options) -> "Run":
        """Start a run in the background. `options` are flags and options of `ForkServer.start`."""
        forking = dict(self.forking)
        for name in FORKING & options.keys():
            forking[name] = options.pop(name)
        argv = self.flags(output_dir, **options)
        return server(self.script).start(argv, self.directory, **forking)

    def start_argv(self, argv: list[str]) -> "Run":
        """Start a run in the background with exactly this command line."""
        return server(self.script).start(argv, self.directory)

    def run(self, output_dir, **options) -> "Run":
        """Start a run and wait until it ends."""
        return self.start(output_dir, **options).wait()


# ---------------------------------------------------------------------------------------
# Files that a run writes
# ---------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in ascending order."""
    folder = output_dir / "checkpoints"
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def wait_for(condition: Callable, *runs, seconds: float = 800):
    """Wait until `condition()` is true, which it must be before one of `runs` has ended.

    The limit is far longer than it takes, also on a machine that does much else.
    """
    end = time.monotonic() + seconds
    while not condition():
        has_ended = any(run.poll() is not None for run in runs)
        assert condition() or not has_ended, [run.stderr for run in runs]
        assert time.monotonic() < end, [run.stderr for run in runs]
        time.sleep(0.005)


def snapshot(directory: Path) -> dict:
    """Return the size and modification time of a folder and of everything in it, by path."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


# ---------------------------------------------------------------------------------------
# Fork server
# ---------------------------------------------------------------------------------------

# Options of `ForkServer.start`. All other keyword arguments of `Place.start` are flags.
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


# XLA's alarm about a compilation of over two minutes: a line when they have passed, and lines in a
# frame when the compilation has ended.
SLOW_COMPILATION = re.compile(
    r"(?m)^E\d{4} .* slow_operation_alarm\.cc:\d+\] .*\n(\n)?\*+\n.*Very slow compile.*\n\*+\n"
)


def without_alarms(stderr: str) -> str:
    """Leave out XLA's alarms about slow compilations: machines may be busy."""
    return SLOW_COMPILATION.sub("", stderr)


class Run:
    """A child of the fork server, with the interface of `subprocess.Popen`."""

    def __init__(self, server, pid: int, streams: Path):
        self.server = server
        self.pid = pid
        self.streams = streams
        self.returncode = None

    def poll(self) -> int | None:
        """Return the exit status, or None while the child runs.

        As in a shell, a child that a signal killed has the status 128 + the signal's number.
        """
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 800) -> "Run":
        """Wait until the child ends. After `timeout` seconds, kill it and raise AssertionError."""
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
        """What the child has written so far. It opens the file after it is started."""
        path = self.streams.with_suffix(".stderr")
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def stdout(self) -> str:
        return self.streams.with_suffix(".stdout").read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """The lines of stderr that are not log lines of level INFO, without XLA's alarms."""
        lines = without_alarms(self.stderr).splitlines()
        return [line for line in lines if not re.match(r"\d\d:\d\d:\d\d INFO ", line)]


class ForkServer:
    """A process that has imported a script and forks a child for each run."""

    def __init__(self, script: Script, directory: Path):
        self.path = script.path
        self.directory = directory
        self.count = 0
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(script.path), *script.modules],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        """Send a request to the server and return its answer."""
        with self.lock:
            answer = ""
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            if not answer:
                status = self.process.wait()
                raise AssertionError(
                    f"the process that imports {self.path} ended with status {status}; the first "
                    "test that used it has its error on stderr"
                )
            return json.loads(answer)

    def start(
        self,
        argv,
        cwd,
        devices=2,
        env=None,
        kill_at=(),
        kill_with=signal.SIGKILL,
        compiles=None,
        file_limit=None,
        optimized=False,
        change=None,
    ) -> Run:
        """Fork a child that runs the script.

        Args:
            argv: the command line.
            cwd: the working directory.
            devices: number of virtual CPU devices.
            env: environment variables to set.
            kill_at: regular expressions for Python's file operations, which are named "open PATH"
                (for writing), "mkdir PATH", "remove PATH", "rmdir PATH" and "rename PATH PATH".
                When all expressions have matched in order, the child sends itself `kill_with`
                before the last operation.
            kill_with: the signal for `kill_at`.
            compiles: file to which the child writes the names of the functions that it compiles.
            file_limit: size in bytes of the largest file that the child may write.
            optimized: whether XLA optimizes as it does for users. Compiling then takes longer.
            change: function that takes the script's module and is called before the script runs, to
                slow something down or to watch it. Only its source is sent, so it must be at the
                top level of a file and import what it uses.
        """
        self.count += 1
        streams = self.directory / f"run-{self.count}"
        devices_flag = f"--xla_force_host_platform_device_count={devices}"
        request = {
            "argv": [str(argument) for argument in argv],
            "cwd": str(cwd),
            "env": {"XLA_FLAGS": devices_flag, **(env or {})},
            "streams": str(streams),
            "kill_at": list(kill_at),
            "kill_with": int(kill_with),
            "compiles": str(compiles) if compiles else None,
            "file_limit": file_limit,
            "optimized": optimized,
            "change": (change.__name__, inspect.getsource(change)) if change else None,
        }
        return Run(self, self.ask(**request), streams)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def child_environment(devices: int = 2, **changes) -> dict[str, str]:
    """Return the environment variables for a process that runs a script on virtual CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **changes,
    }


@cache
def server(script: Script) -> ForkServer:
    """Return the script's server. It starts on the first call and runs until the session ends."""
    directory = tempfile.TemporaryDirectory()
    started = ForkServer(script, Path(directory.name))

    def stop():
        started.close()
        directory.cleanup()

    atexit.register(stop)
    return started


# The functions below run in the server's process and in its children.


def kill_self_at(patterns: list[str], number: int):
    """Add an audit hook that sends this process a signal once file operations match `patterns`.

    Each pattern counts only after the one before it has matched.
    """
    remaining = [re.compile(pattern) for pattern in patterns]

    def hook(event, args):
        name = event.removeprefix("os.")
        if name not in ("open", "mkdir", "rename", "remove", "rmdir"):
            return
        if name == "open":
            flags = args[2] if len(args) > 2 else None
            if not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        paths = [os.fspath(arg) for arg in args if isinstance(arg, (str, bytes, os.PathLike))]
        paths = [os.fsdecode(path) for path in paths]
        num_paths = 2 if name == "rename" else 1
        operation = " ".join([name, *paths[:num_paths]])
        if remaining and remaining[0].search(operation):
            remaining.pop(0)
            if not remaining:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def record_compiles(path: str):
    """Append the name of each function that XLA compiles or loads from its cache to a file."""
    import jax

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            with open(path, "a") as file:
                file.write(f"{kwargs.get('fun_name')}\n")

    jax.monitoring.register_event_duration_secs_listener(listener)


def import_script(path: str, modules: list[str]):
    """Import a script and the modules that its runs import late, and return the script's module."""
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    for module in modules:
        importlib.import_module(module)
    # Children share the memory pages of the imported modules as long as nothing writes to them.
    gc.collect()
    gc.freeze()
    return script


def poll_child(pid: int, running: set[int]) -> int | None:
    """Return a child's exit status, as `Run.poll` does, and remove the child from `running`."""
    ended_pid, status = os.waitpid(pid, os.WNOHANG)
    if ended_pid == 0:
        return None
    running.discard(pid)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def serve_requests() -> dict | None:
    """Answer requests on stdin until it is closed; then kill the children and return None.

    A request is one line of JSON, and so is its answer. A request with "poll" asks for the exit
    status of a child; any other request forks a child. There this function returns the request.
    """
    running = set()
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as answers:
        for line in requests:
            request = json.loads(line)
            if "poll" in request:
                answer = poll_child(request["poll"], running)
            else:
                answer = os.fork()
                if answer == 0:
                    return request
                running.add(answer)
            print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return None


def redirect_streams(streams: str):
    """Read stdin from the null device, and write stdout and stderr to files."""
    for descriptor, suffix in ((1, ".stdout"), (2, ".stderr")):
        file = os.open(streams + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def run_request(path: str, script, request: dict):
    """Run the script in a forked child as the request says, and exit."""
    redirect_streams(request["streams"])
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
        namespace = {}
        exec(source, namespace)
        namespace[name](script)
    sys.argv = [path, *request["argv"]]
    script.main()


def serve(path: str, modules: list[str]):
    """Import a script and run it in a forked child for each request on stdin."""
    script = import_script(path, modules)
    request = serve_requests()
    if request is not None:
        run_request(path, script, request)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
