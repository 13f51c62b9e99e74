"""Runs a script of the project as it is, in a process of its own, and notes what takes how long.

For the other benchmarks: `run` starts the child, `python benchmarks/harness.py SETTINGS SCRIPT FLAGS ...`, and returns
its notes. Times are in seconds:

    imports, data, initialization, compilation   of these parts, until the first step
    to_first_step                                from the command until the first step is compiled and under way
    first_step                                   from then to its end
    loop, bare, ratio                            of a step of the run, of a step of the same program on a batch that
                                                 lies ready, and of the first to the second: medians
    process                                      of the whole run

For these a run of `segment` steps and as many bare steps take turns, so that what else the machine does falls on both.
`tokens` and `flops` are those of a step on all devices, `product_flops` the rate of a large matrix product.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
WARM_UP = 10  # steps
DATA = ("load_config_and_tokenizer", "load_texts", "tokenize")
INITIALIZATION = ("load_model", "make_optimizer", "shard")
OBJECTIVES = {  # name: script, type of the model, flag of the length
    "masked": ("run_mlm_flax.py", "roberta", "max_seq_length"),
    "causal": ("run_clm_flax.py", "gpt2", "block_size"),
    "span-masked": ("run_t5_mlm_flax.py", "t5", "max_seq_length"),
    "denoising": ("run_bart_dlm_flax.py", "bart", "max_seq_length"),
}
SIZES = {"small": (2, 128, 2), "base": (12, 768, 12)}  # layers, width, heads
NUM_SENTINELS = 100


# ------------------------------------------------------------------------------------- models, texts, command lines


def write_corpus(directory: Path, megabytes: float) -> Path:
    """A file of so many megabytes of Python's documentation, one paragraph a line."""
    import quickstart

    if not (directory / "all" / "train.txt").exists():
        quickstart.build_corpus(directory / "all")
    lines, size, path = [], 0, directory / f"text-{megabytes:g}.txt"
    for line in (directory / "all" / "train.txt").read_text("utf-8").splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= megabytes * 1e6:
            break
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_model(
    directory: Path, text: Path, model_type: str, size: str, length: int, vocab_size: int
) -> Path:
    """A folder with a tokenizer, a byte-level BPE with the special tokens of all objectives, and a configuration. The
    model has `vocab_size` rows also where the text is too small for so many pieces."""
    from transformers import CONFIG_MAPPING

    import quickstart

    folder = directory / f"{model_type}-{size}-{length}"
    tokenizer = quickstart.train_tokenizer([text], folder, vocab_size=vocab_size, max_length=length)
    if model_type == "t5":
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]}
        )
        tokenizer.save_pretrained(folder)
    layers, width, heads = SIZES[size]
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")
    }
    sizes = {
        "roberta": {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        | {
            "intermediate_size": 4 * width,
            "max_position_embeddings": length + 2,
            "type_vocab_size": 1,
        },
        "gpt2": {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": length},
        "t5": {
            "num_layers": layers,
            "d_model": width,
            "num_heads": heads,
            "d_kv": width // heads,
            "d_ff": 4 * width,
        },
        "bart": {
            "encoder_layers": layers,
            "decoder_layers": layers,
            "d_model": width,
            "encoder_ffn_dim": 4 * width,
        }
        | {
            "decoder_ffn_dim": 4 * width,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
        }
        | {"max_position_embeddings": length},
    }
    config = CONFIG_MAPPING[model_type](
        vocab_size=max(vocab_size, len(tokenizer)), **ids, **sizes[model_type]
    )
    config.save_pretrained(folder)
    return folder


def command(
    objective: str, folder: Path, text: Path, output_dir: Path, rows: int, length: int, **flags
):
    """Script and flags of a run that only trains; further flags as {name: value}, a switch as True."""
    script, model_type, length_flag = OBJECTIVES[objective]
    given = {
        "output_dir": output_dir,
        "model_type": model_type,
        "config_name": folder,
        "tokenizer_name": folder,
    }
    given |= {
        "train_file": text,
        length_flag: length,
        "per_device_train_batch_size": rows,
        "do_train": True,
    }
    given |= {"overwrite_output_dir": True, "save_steps": 10**6, "learning_rate": 1e-4, **flags}
    return script, [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()
    ]


def processor() -> str:
    """The processor's name, and its number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def write_json(path: Path | None, figures):
    """With the command, the processor and the versions: what benchmarks/tables.py writes into the README."""
    if path is None:
        return
    words = sys.argv[1:]
    if "--json" in words:
        del words[words.index("--json") : words.index("--json") + 2]
    found = {"command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])}
    found |= {"processor": processor(), "python": platform.python_version()}
    found |= {
        name: metadata.version(name)
        for name in ("jax", "flax", "transformers", "datasets", "tokenizers")
    }
    path.write_text(json.dumps(found | {"figures": figures}, indent=1) + "\n")


def run(
    directory: Path, script: str, flags: list[str], env: dict | None = None, **settings
) -> dict:
    """Notes of a run; `settings` are those of `Notes`. A run that fails ends the benchmark with its error."""
    (process,) = start(directory, script, flags, [env or {}], **settings)
    return finish(directory, [process])


def start(
    directory: Path, script: str, flags: list[str], envs: list[dict], **settings
) -> list[subprocess.Popen]:
    """A process for each of `envs`, in which XLA_FLAGS and the variables of a cluster may be."""
    (directory / "notes.json").unlink(missing_ok=True)
    settings = {"notes": str(directory / "notes.json"), "start": time.time()} | settings
    (directory / "settings.json").write_text(json.dumps(settings))
    arguments = [sys.executable, __file__, str(directory / "settings.json"), script, *flags]
    given = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(directory / "datasets")}
    given |= {"JAX_COMPILATION_CACHE_DIR": str(directory / "compiled")}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}  # Gloo writes to the former
    return [
        subprocess.Popen(arguments, env={**os.environ, **given, **env}, **pipes) for env in envs
    ]


def finish(directory: Path, processes: list[subprocess.Popen]) -> dict:
    errors = [process.communicate()[1].decode(errors="replace") for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("\n".join(errors))
    seconds = time.time() - json.loads((directory / "settings.json").read_text())["start"]
    path = directory / "notes.json"
    return {**(json.loads(path.read_text()) if path.exists() else {}), "process": seconds}


# --------------------------------------------------------------------------------------------------------- the child


def count_flops(program) -> float:
    """Floating-point operations of the matrix products of a jaxpr, two for each multiplication and addition."""
    import jax

    total = 0.0
    for equation in program.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            (contracted, _), _ = equation.params["dimension_numbers"]
            sums = 1.0
            for axis in contracted:
                sums *= equation.invars[0].aval.shape[axis]
            total += 2 * equation.outvars[0].aval.size * sums
        leaves = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        inner = [count_flops(x) for x in leaves if hasattr(x, "eqns")]
        total += (max if equation.primitive.name == "cond" else sum)(
            inner or [0.0]
        ) * equation.params.get("length", 1)
    return total


def product_flops(dtype: str, size: int) -> float:
    """Operations a second of a product of square matrices, the median of ten."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(dtype))
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds[2:])


class Notes:
    """Wraps functions of a script. Settings: `segment`, in steps, for `loop` and `bare`; `product`, a data type and a
    size."""

    def __init__(self, script, settings: dict):
        self.settings, self.steps, self.last, self.segments = settings, 0, None, []
        self.found = {
            "imports": time.time() - settings["start"],
            "data": 0.0,
            "initialization": 0.0,
        }
        for kind, names in (("data", DATA), ("initialization", INITIALIZATION)):
            for name in names:
                if hasattr(script, name):
                    setattr(script, name, self.timed(kind, getattr(script, name)))
        self.patch_pmap()

    def timed(self, kind: str, function):
        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.found[kind] += 0 if self.steps else time.perf_counter() - begin

        return timed

    def patch_pmap(self):
        import jax

        pmap = jax.pmap

        def patched(function, *args, **kwargs):
            mapped = pmap(function, *args, **kwargs)
            if "donate_argnums" not in kwargs:  # of the evaluation
                return mapped
            self.step, self.countable = mapped, pmap(function, *args)
            return self.run_step

        jax.pmap = patched

    def run_step(self, state, totals, batch):
        import jax

        begin = time.perf_counter()
        self.last = (*self.step(state, totals, batch), batch)
        self.steps += 1
        if self.steps == 1:
            self.found["compilation"] = time.perf_counter() - begin
            self.found["to_first_step"], begin = (
                time.time() - self.settings["start"],
                time.perf_counter(),
            )
            jax.block_until_ready(self.last)
            self.found["first_step"] = time.perf_counter() - begin
        segment = self.settings.get("segment")
        if segment and self.steps >= WARM_UP and (self.steps - WARM_UP) % segment == 0:
            jax.block_until_ready(self.last)
            loop = time.perf_counter() - self.begun if self.steps > WARM_UP else None
            begin = time.perf_counter()
            for _ in range(segment):
                self.last = (*self.step(*self.last), batch)
            jax.block_until_ready(self.last)
            self.begun = time.perf_counter()
            loop and self.segments.append((loop / segment, (self.begun - begin) / segment))
        return self.last[:2]

    def write(self):
        import jax

        found, batch = self.found, self.last[-1]
        found["tokens"] = batch["attention_mask"].size * jax.process_count()
        found["flops"] = (
            count_flops(jax.make_jaxpr(self.countable)(*self.last).jaxpr) * jax.device_count()
        )
        if self.segments:
            found["loop"], found["bare"] = map(statistics.median, zip(*self.segments, strict=True))
            found["ratio"] = statistics.median(loop / bare for loop, bare in self.segments)
        if "product" in self.settings:
            found["product_flops"] = product_flops(*self.settings["product"])
        memory = [device.memory_stats() for device in jax.local_devices()]
        found["peak_bytes"] = max(
            (stats["peak_bytes_in_use"] for stats in memory if stats), default=None
        )
        found |= {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
        if jax.process_index() == 0:
            Path(self.settings["notes"]).write_text(json.dumps(found))


def main() -> int:
    settings, name, flags = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], sys.argv[3:]
    script = import_module(name.removesuffix(".py"))
    notes = Notes(script, settings)
    if settings.get("simple"):
        import_module("whole_run").simplify(script)
    status = script.cli(flags)
    status or not settings["notes"] or notes.write()
    return status


if __name__ == "__main__":
    sys.exit(main())
