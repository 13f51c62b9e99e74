"""Run a script of the project unchanged, in its own process, and time its parts.

The other benchmarks call `run`. It starts `python benchmarks/harness.py SETTINGS SCRIPT FLAGS ...`
as a child process and returns what the child noted. Times are in seconds:

    imports, data, initialization, compilation   these parts, until the first step
    save                                         writing checkpoints and models, in all
    to_first_step                                from the command until the first step is compiled
                                                 and dispatched
    first_step                                   from then until the first step is done
    loop                                         median time of a step of the run
    bare                                         median time of a step of the same compiled program
                                                 on a batch that is already on the devices
    ratio                                        median of `loop` / `bare` over the segments
    run                                          from the command until `main` of the script returns
    process                                      from the command until the process ends, with what
                                                 is measured after the run
    steps_per_second                             of the run, after the first ten steps; without
                                                 segments, whose bare steps it would include

For `loop`, `bare` and `ratio`, segments of `segment` steps of the run alternate with segments of as
many bare steps, so that other work on the machine slows both down alike. `tokens` and `flops` count
one step on all devices. `product_flops` is the rate of a large matrix product.
"""

import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
WARM_UP = 10  # steps
NUM_SENTINELS = 100

# The functions of a script whose time counts as `data` and as `initialization`.
DATA = ("load_config_and_tokenizer", "load_texts", "tokenize")
INITIALIZATION = ("load_model", "make_optimizer", "create_train_state", "shard")


class Objective(NamedTuple):
    """A training script, the type of the model it trains here, and its flag for the length."""

    script: str
    model_type: str
    length_flag: str


OBJECTIVES = {
    "masked": Objective("run_mlm_flax.py", "roberta", "max_seq_length"),
    "causal": Objective("run_clm_flax.py", "gpt2", "block_size"),
    "span-masked": Objective("run_t5_mlm_flax.py", "t5", "max_seq_length"),
    "denoising": Objective("run_bart_dlm_flax.py", "bart", "max_seq_length"),
}


class Size(NamedTuple):
    """The size of a model. BART has this number of layers on each side, as T5 does."""

    layers: int
    width: int
    heads: int


SIZES = {"small": Size(2, 128, 2), "base": Size(12, 768, 12)}


# ------------------------------------------------------------------ texts, models, command lines


def write_corpus(directory: Path, megabytes: float) -> Path:
    """Write `megabytes` of Python's documentation to a file, one paragraph a line."""
    import quickstart

    all_text = directory / "all" / "train.txt"
    if not all_text.exists():
        quickstart.build_corpus(all_text.parent)
    lines = []
    num_bytes = 0
    for line in all_text.read_text("utf-8").splitlines(keepends=True):
        lines.append(line)
        num_bytes += len(line.encode())
        if num_bytes >= megabytes * 1e6:
            break
    path = directory / f"text-{megabytes:g}.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def size_settings(model_type: str, size: Size, length: int) -> dict[str, int]:
    """The settings of a model's configuration that say how large it is."""
    settings = {
        "roberta": {
            "num_hidden_layers": size.layers,
            "hidden_size": size.width,
            "num_attention_heads": size.heads,
            "intermediate_size": 4 * size.width,
            "max_position_embeddings": length + 2,
            "type_vocab_size": 1,
        },
        "gpt2": {
            "n_layer": size.layers,
            "n_embd": size.width,
            "n_head": size.heads,
            "n_positions": length,
        },
        "t5": {
            "num_layers": size.layers,
            "d_model": size.width,
            "num_heads": size.heads,
            "d_kv": size.width // size.heads,
            "d_ff": 4 * size.width,
        },
        "bart": {
            "encoder_layers": size.layers,
            "decoder_layers": size.layers,
            "d_model": size.width,
            "encoder_ffn_dim": 4 * size.width,
            "decoder_ffn_dim": 4 * size.width,
            "encoder_attention_heads": size.heads,
            "decoder_attention_heads": size.heads,
            "max_position_embeddings": length,
        },
    }
    return settings[model_type]


def write_model(
    directory: Path, text: Path, model_type: str, size: str, length: int, vocab_size: int
) -> Path:
    """Write a tokenizer and a configuration to a folder and return the folder.

    The tokenizer is a byte-level BPE with the special tokens of all objectives. The model has at
    least `vocab_size` rows, even if the text is too small for a tokenizer with that many tokens.
    """
    from transformers import CONFIG_MAPPING

    import quickstart

    folder = directory / f"{model_type}-{size}-{length}"
    tokenizer = quickstart.train_tokenizer([text], folder, vocab_size=vocab_size, max_length=length)
    if model_type == "t5":
        sentinels = [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]
        tokenizer.add_special_tokens({"additional_special_tokens": sentinels})
        tokenizer.save_pretrained(folder)
    config = CONFIG_MAPPING[model_type](
        vocab_size=max(vocab_size, len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **size_settings(model_type, SIZES[size], length),
    )
    config.save_pretrained(folder)
    return folder


def command(
    objective: str, folder: Path, text: Path, output_dir: Path, rows: int, length: int, **flags
) -> tuple[str, list[str]]:
    """The script and the flags of a run that trains and saves once, at its end.

    More flags are given as NAME=VALUE, a switch as NAME=True.
    """
    script, model_type, length_flag = OBJECTIVES[objective]
    all_flags = {
        "output_dir": output_dir,
        "model_type": model_type,
        "config_name": folder,
        "tokenizer_name": folder,
        "train_file": text,
        length_flag: length,
        "per_device_train_batch_size": rows,
        "do_train": True,
        "overwrite_output_dir": True,
        "save_steps": 10**6,
        "learning_rate": 1e-4,
        **flags,
    }
    words = []
    for name, value in all_flags.items():
        words.append(f"--{name}" if value is True else f"--{name}={value}")
    return script, words


def processor() -> str:
    """The name of the processor, and the number of its cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return f"{name}, {cores} cores"


def write_json(path: Path | None, figures):
    """Write figures to a file, with the command, the processor and the versions of the libraries.

    `make docs` makes the tables of docs/benchmarks.md from such files. Without a path, write none.
    """
    if path is None:
        return
    words = sys.argv[1:]
    if "--json" in words:
        position = words.index("--json")
        del words[position : position + 2]
    report = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "processor": processor(),
        "python": platform.python_version(),
    }
    for library in ("jax", "flax", "transformers", "datasets", "tokenizers"):
        report[library] = metadata.version(library)
    report["figures"] = figures
    path.write_text(json.dumps(report, indent=1) + "\n")


# ---------------------------------------------------------------------------- the parent process


def run(
    directory: Path, script: str, flags: list[str], env: dict | None = None, **settings
) -> dict:
    """Run a script to its end and return its notes.

    `settings` are those of `Notes`. If the run fails, exit with its error.
    """
    (process,) = start(directory, script, flags, [env or {}], **settings)
    return finish(directory, [process])


def start(
    directory: Path, script: str, flags: list[str], envs: list[dict], **settings
) -> list[subprocess.Popen]:
    """Start one process for each environment of `envs` and return the processes.

    An environment can set XLA_FLAGS and the variables that make the processes a cluster.
    """
    (directory / "notes.json").unlink(missing_ok=True)
    settings = {"notes": str(directory / "notes.json"), "start": time.time()} | settings
    (directory / "settings.json").write_text(json.dumps(settings))
    arguments = [sys.executable, __file__, str(directory / "settings.json"), script, *flags]
    common = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(directory / "datasets"),
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
    }
    processes = []
    for env in envs:
        process = subprocess.Popen(
            arguments,
            env={**os.environ, **common, **env},
            # Gloo, with which the processes of a CPU cluster communicate, prints to stdout.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
    return processes


def finish(directory: Path, processes: list[subprocess.Popen]) -> dict:
    """Wait for all processes and return the notes of the first, or exit with their errors."""
    errors = [process.communicate()[1].decode(errors="replace") for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("\n".join(errors))
    settings = json.loads((directory / "settings.json").read_text())
    seconds = time.time() - settings["start"]
    notes_path = directory / "notes.json"
    notes = json.loads(notes_path.read_text()) if notes_path.exists() else {}
    return {**notes, "process": seconds}


# ----------------------------------------------------------------------------- the child process


def dot_general_flops(equation) -> float:
    """Count the floating-point operations of a matrix product."""
    (contracted_axes, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    num_terms = 1.0
    for axis in contracted_axes:
        num_terms *= shape[axis]
    return 2 * equation.outvars[0].aval.size * num_terms


def subprograms(equation) -> list:
    """The jaxprs that an equation calls, such as the body of a loop."""
    import jax

    def is_jaxpr(parameter) -> bool:
        return hasattr(parameter, "eqns")

    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [leaf for leaf in leaves if is_jaxpr(leaf)]


def count_flops(jaxpr) -> float:
    """Count the floating-point operations of the matrix products of a jaxpr.

    A multiplication and an addition are two. The body of a `scan` counts once per iteration, and a
    `cond` counts as its most expensive branch.
    """
    import jax

    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            total += dot_general_flops(equation)
        counts = [count_flops(subprogram) for subprogram in subprograms(equation)]
        is_branch = equation.primitive.name == "cond"
        called = max(counts, default=0.0) if is_branch else sum(counts)
        num_iterations = equation.params.get("length", 1)
        total += called * num_iterations
    return total


def product_flops(dtype: str, size: int) -> float:
    """Measure the operations per second of a product of square matrices, the median of ten."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def square(matrix):
        return jnp.dot(matrix, matrix, preferred_element_type=jnp.float32).astype(dtype)

    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        square(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    # The first call compiles, and the second warms up.
    return 2 * size**3 / statistics.median(seconds[2:])


class Notes:
    """Times the parts of a script by wrapping its functions and `jax.pmap`.

    Settings:

        notes     file to write
        start     time at which the command was started
        segment   number of steps in a segment for `loop` and `bare`; none are timed without it
        product   data type and size of the matrices for `product_flops`
        flops     whether to count the operations of a step and to plan its memory, which takes
                  seconds; true by default
    """

    def __init__(self, script, settings: dict):
        self.settings = settings
        self.num_steps = 0
        # When each step was dispatched.
        self.dispatched = []
        # State, totals and batch after the last step.
        self.last = None
        # Seconds per step, of the run and of the bare steps, for each segment.
        self.segments = []
        # When the current segment of the run began.
        self.segment_begin = None
        self.found = {
            "imports": time.time() - settings["start"],
            "data": 0.0,
            "initialization": 0.0,
            "save": 0.0,
        }
        for part, names in (("data", DATA), ("initialization", INITIALIZATION)):
            for name in names:
                if hasattr(script, name):
                    setattr(script, name, self.timed(part, getattr(script, name)))
        script.Saver.write = self.timed("save", script.Saver.write)
        self.patch_pmap()

    def timed(self, part: str, function):
        """Wrap a function so that its time before the first step, or that of saves, is noted."""

        def timed_function(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if self.num_steps == 0 or part == "save":
                    self.found[part] += time.perf_counter() - begin

        return timed_function

    def patch_pmap(self):
        """Make `jax.pmap` return `run_step` for the train step, which is the one that donates."""
        import jax

        pmap = jax.pmap

        def patched_pmap(function, *args, **kwargs):
            mapped = pmap(function, *args, **kwargs)
            if "donate_argnums" not in kwargs:
                return mapped
            self.train_step = mapped
            # `write` traces this one with the last state, for the count of operations.
            del kwargs["donate_argnums"]
            self.undonated_train_step = pmap(function, *args, **kwargs)
            return self.run_step

        jax.pmap = patched_pmap

    def run_step(self, state, totals, batch):
        """Take the place of the compiled train step, and time the first one and the segments."""
        begin = time.perf_counter()
        state, totals = self.train_step(state, totals, batch)
        self.last = (state, totals, batch)
        self.num_steps += 1
        self.dispatched.append(time.perf_counter())
        if self.num_steps == 1:
            self.time_first_step(begin)
        segment = self.settings.get("segment")
        if segment and self.num_steps >= WARM_UP and (self.num_steps - WARM_UP) % segment == 0:
            self.time_segment(segment)
        state, totals, _ = self.last
        return state, totals

    def time_first_step(self, begin: float):
        """Note when the first step, called at `begin`, was dispatched, and when it is done."""
        import jax

        self.found["compilation"] = time.perf_counter() - begin
        self.found["to_first_step"] = time.time() - self.settings["start"]
        begin = time.perf_counter()
        jax.block_until_ready(self.last)
        self.found["first_step"] = time.perf_counter() - begin

    def time_segment(self, segment: int):
        """End a segment of the run, and take as many bare steps on the last batch."""
        import jax

        jax.block_until_ready(self.last)
        begin = time.perf_counter()
        state, totals, batch = self.last
        for _ in range(segment):
            state, totals = self.train_step(state, totals, batch)
        self.last = (state, totals, batch)
        jax.block_until_ready(self.last)
        end = time.perf_counter()
        # The first call only ends the warm-up.
        if self.segment_begin is not None:
            loop_seconds = begin - self.segment_begin
            bare_seconds = end - begin
            self.segments.append((loop_seconds / segment, bare_seconds / segment))
        self.segment_begin = end

    def write(self):
        """Add what is known after the run, and write the notes in the first process."""
        import jax

        found = self.found
        found["peak_memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["run"] = time.time() - self.settings["start"]
        batch = self.last[-1]
        found["tokens"] = batch["attention_mask"].size * jax.process_count()
        if self.settings.get("flops", True):
            traced = jax.make_jaxpr(self.undonated_train_step)(*self.last)
            found["flops"] = count_flops(traced.jaxpr) * jax.device_count()
            # The compiled step lies in the persistent cache.
            plan = self.train_step.lower(*self.last).compile().memory_analysis()
            found["planned_bytes"] = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        if len(self.dispatched) > WARM_UP:
            # The host stays one step ahead of the devices.
            seconds = self.dispatched[-1] - self.dispatched[WARM_UP - 1]
            found["steps_per_second"] = (len(self.dispatched) - WARM_UP) / seconds
        if self.segments:
            found["loop"] = statistics.median(loop for loop, _ in self.segments)
            found["bare"] = statistics.median(bare for _, bare in self.segments)
            found["ratio"] = statistics.median(loop / bare for loop, bare in self.segments)
        if "product" in self.settings:
            found["product_flops"] = product_flops(*self.settings["product"])
        # CPU devices have no memory statistics.
        memory = [device.memory_stats() for device in jax.local_devices()]
        peaks = [stats["peak_bytes_in_use"] for stats in memory if stats]
        found["peak_bytes"] = max(peaks, default=None)
        found["device"] = jax.local_devices()[0].device_kind
        found["jax"] = jax.__version__
        if jax.process_index() == 0:
            Path(self.settings["notes"]).write_text(json.dumps(found))


def main():
    settings_file, name, *flags = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())
    script = import_module(name.removesuffix(".py"))
    notes = Notes(script, settings)
    if settings.get("simple"):
        import_module("whole_run").simplify(script)
    script.main(flags)
    if settings["notes"]:
        notes.write()


if __name__ == "__main__":
    main()
