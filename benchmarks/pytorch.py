#!/usr/bin/env python
"""Compare the scripts with PyTorch: the same model, data, optimizer and number of steps.

    make pytorch
    python benchmarks/pytorch.py [--python .venv-pytorch/bin/python] [--objectives masked causal]
        [--sizes small base] [--dtypes float32 bfloat16] [--rows 8] [--length 128] [--steps 300]
        [--pairs 3] [--vocab_size 8000] [--megabytes 1] [--product 2048]
        [--gradient_checkpointing auto] [--compile] [--json FILE]

PyTorch's side is the Trainer of Transformers 5 with its models (scaled_dot_product_attention) and
DataCollatorForLanguageModeling. It runs in an environment of its own. Transformers has no collators
for the span-masked and the denoising objective, so those of row_collators.py are used. Both sides
begin with the same weights. Of a pair of runs, either may be first. From the second pair on, the
script finds its compiled programs and its tokens in caches. Each side evaluates the same text at
the end. Columns, medians of the pairs:

    steps/s       steps a second after the first ten, for the script and for PyTorch, and the ratio
    first step    seconds from the command to the end of the first step
    run           seconds from the command to the end: of the process for PyTorch, and of `main` for
                  the script
    memory        peak in GB: of the device, or, on a CPU, of the process
    eval loss     of the same 48 sequences, which each side masks in its own way
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("masked", "causal", "span-masked", "denoising")
WARM_UP = 10  # steps
# The evaluation set, in sequences, and a batch of it. No batch is left incomplete.
NUM_EVAL = 48
EVAL_ROWS = 8
# One of so many lines of the text is for evaluation.
EVAL_SHARE = 10
FLAGS = {
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "seed": 42,
}

# --------------------------------------------------------------- PyTorch's side: the child process


def make_pytorch_model(model_type: str, folder: str):
    """Make the model of a folder's configuration, or load its weights if it has some."""
    import transformers

    names = {
        "roberta": "AutoModelForMaskedLM",
        "gpt2": "AutoModelForCausalLM",
        "t5": "AutoModelForSeq2SeqLM",
        "bart": "AutoModelForSeq2SeqLM",
    }
    auto_class = getattr(transformers, names[model_type])
    if (Path(folder) / "model.safetensors").exists():
        return auto_class.from_pretrained(folder)
    transformers.set_seed(FLAGS["seed"])
    return auto_class.from_config(transformers.AutoConfig.from_pretrained(folder))


def read_blocks(tokenizer, text: str, settings: dict) -> list[dict]:
    """Tokenize a text file, concatenate its lines and cut them into blocks, as the scripts do.

    Only the causal script keeps the line breaks.
    """
    length = settings["length"]
    lines = Path(text).read_text("utf-8").splitlines(keepends=settings["objective"] == "causal")
    tokens = []
    for ids in tokenizer(lines, verbose=False)["input_ids"]:
        tokens += ids
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": tokens[start : start + length]} for start in starts]


def make_collator(tokenizer, settings: dict):
    """The noise of the objective, as a function from examples to tensors."""
    import torch
    import transformers
    from row_collators import Denoising, SpanCorruption

    if settings["objective"] == "span-masked":
        collator = SpanCorruption(
            tokenizer, settings["num_noise"], settings["num_spans"], FLAGS["seed"]
        )
    elif settings["objective"] == "denoising":
        collator = Denoising(tokenizer, FLAGS["seed"])
    else:
        is_masked = settings["objective"] == "masked"
        return transformers.DataCollatorForLanguageModeling(
            tokenizer, mlm=is_masked, mlm_probability=0.15
        )

    def collate(examples: list[dict]) -> dict:
        arrays = collator(examples)
        return {name: torch.from_numpy(array).long() for name, array in arrays.items()}

    return collate


def batched(rows: list, size: int) -> list[list]:
    """Cut a list into lists of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluate(model, batches: list[dict], is_bfloat16: bool) -> float:
    """The mean loss of batches.

    The Trainer's evaluation (Transformers 5.24) divides the losses of a causal model by the number
    of labels, although none predicts the first token: for 128 tokens its loss is 1/128 too low.
    """
    import torch

    model.eval()
    losses = []
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=is_bfloat16):
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses.append(model(**on_device).loss.item())
    return statistics.mean(losses)


class StepTimes:
    """The time at the end of each step."""

    def __init__(self):
        self.times = []

    def callback(self):
        """Make a callback of the Trainer that notes the times."""
        import torch
        from transformers import TrainerCallback

        times = self.times

        class NoteTimes(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                # Only where the count begins and ends does the host wait for the GPU.
                if torch.cuda.is_available() and state.global_step in (1, WARM_UP, state.max_steps):
                    torch.cuda.synchronize()
                times.append(time.time())

        return NoteTimes()


def run_pytorch(settings: dict) -> None:
    """Train by the Trainer of Transformers, and write what was measured to a file."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["folder"])
    model = make_pytorch_model(settings["model_type"], settings["folder"])
    if settings["initialize"]:
        model.save_pretrained(settings["folder"])
        return
    has_gpu = torch.cuda.is_available()
    collate = make_collator(tokenizer, settings)
    step_times = StepTimes()
    arguments = transformers.TrainingArguments(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=settings["rows"],
        max_steps=settings["steps"],
        lr_scheduler_type="linear",
        optim="adamw_torch_fused" if has_gpu else "adamw_torch",
        max_grad_norm=0,
        bf16=settings["dtype"] == "bfloat16",
        tf32=True if has_gpu else None,
        torch_compile=settings["compile"],
        dataloader_num_workers=2 if has_gpu else 0,
        dataloader_drop_last=True,
        use_cpu=not has_gpu,
        logging_steps=settings["steps"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **FLAGS,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=read_blocks(tokenizer, settings["text"], settings),
        callbacks=[step_times.callback()],
    )
    trainer.train()
    blocks = read_blocks(tokenizer, settings["eval_text"], settings)[:NUM_EVAL]
    is_bfloat16 = settings["dtype"] == "bfloat16"
    eval_loss = evaluate(model, [collate(rows) for rows in batched(blocks, EVAL_ROWS)], is_bfloat16)
    trainer.save_model()
    times = step_times.times
    memory = torch.cuda.max_memory_allocated() if has_gpu else peak_memory()
    found = {
        "steps_per_second": (len(times) - WARM_UP) / (times[-1] - times[WARM_UP - 1]),
        "first_step": times[0] - settings["start"],
        "memory": memory,
        "eval_loss": eval_loss,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
    }
    Path(settings["notes"]).write_text(json.dumps(found))


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------------------- the parent process


class Comparison:
    """Runs of both sides with one model, data type and text."""

    def __init__(self, args, directory: Path, objective: str, size: str, dtype: str):
        import harness

        self.args = args
        self.directory = directory
        self.objective = objective
        self.dtype = dtype
        self.model_type = harness.OBJECTIVES[objective].model_type
        all_text = harness.write_corpus(directory, args.megabytes)
        lines = all_text.read_text("utf-8").splitlines(keepends=True)
        self.eval_text = directory / "eval.txt"
        self.eval_text.write_text("".join(lines[::EVAL_SHARE]), "utf-8")
        self.text = directory / "train.txt"
        kept = [line for number, line in enumerate(lines) if number % EVAL_SHARE]
        self.text.write_text("".join(kept), "utf-8")
        self.folder = harness.write_model(
            directory, all_text, self.model_type, size, args.length, args.vocab_size
        )
        if not (self.folder / "model.safetensors").exists():
            self.run_pytorch_side(initialize=True)

    def run_pytorch_side(self, initialize: bool = False) -> dict:
        """Run PyTorch's side and return what it notes."""
        notes = self.directory / "pytorch.json"
        settings = {
            "initialize": initialize,
            "objective": self.objective,
            "model_type": self.model_type,
            "folder": str(self.folder),
            "text": str(self.text),
            "eval_text": str(self.eval_text),
            "output_dir": str(self.directory / "pytorch"),
            "rows": self.args.rows,
            **self.block_settings(),
            "steps": self.args.steps,
            "dtype": self.dtype,
            "compile": self.args.compile,
            "notes": str(notes),
            "start": time.time(),
        }
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run = subprocess.run(
            [self.args.python, __file__, "--child", json.dumps(settings)],
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            sys.exit(run.stderr)
        if initialize:
            return {}
        return json.loads(notes.read_text()) | {"run": time.time() - settings["start"]}

    def block_settings(self) -> dict:
        """The tokens of a block, and the noise tokens and spans in a block of T5's."""
        length = self.args.length
        if self.objective != "span-masked":
            return {"length": length}
        import run_t5_mlm_flax as script

        block_length, _ = script.compute_input_and_target_lengths(length, 0.15, 3.0)
        num_noise, num_spans = script.noise_counts(block_length, 0.15, 3.0)
        return {"length": block_length, "num_noise": num_noise, "num_spans": num_spans}

    def run_script(self) -> dict:
        """Run the script of this project and return what it notes."""
        import harness

        output_dir = self.directory / "script"
        script, flags = harness.command(
            self.objective,
            self.folder,
            self.text,
            output_dir,
            self.args.rows,
            self.args.length,
            model_name_or_path=self.folder,
            validation_file=self.eval_text,
            do_eval=True,
            per_device_eval_batch_size=EVAL_ROWS,
            max_eval_samples=NUM_EVAL,
            max_steps=self.args.steps,
            eval_steps=10**6,
            logging_steps=self.args.steps,
            dtype=self.dtype,
            gradient_checkpointing=self.args.gradient_checkpointing,
            **FLAGS,
        )
        # The command of the other benchmarks trains from scratch.
        flags = [flag for flag in flags if not flag.startswith(("--model_type", "--config_name"))]
        product = [self.dtype, self.args.product]
        found = harness.run(self.directory, script, flags, product=product)
        results = json.loads((output_dir / "eval_results.json").read_text())
        return {
            **found,
            "first_step": found["to_first_step"] + found["first_step"],
            "memory": found["peak_bytes"] or found["peak_memory"],
            "eval_loss": results["eval_loss"],
        }

    def measure(self) -> dict:
        """Run pairs, the two sides in random order. Returns the notes of all runs by side."""
        sides = {"script": self.run_script, "pytorch": self.run_pytorch_side}
        runs = {"script": [], "pytorch": []}
        for pair in range(self.args.pairs):
            print(f"pair {pair + 1} of {self.args.pairs}", file=sys.stderr)
            for side in random.sample(list(sides), 2):
                runs[side].append(sides[side]())
        devices = {side: notes[0]["device"] for side, notes in runs.items()}
        if (devices["script"] == "cpu") != (devices["pytorch"] == "cpu"):
            sys.exit(f"the two sides ran on different devices: {devices}")
        return runs


def report_line(runs: dict) -> str:
    """A line of the table for the terminal: each column for the script and for PyTorch."""
    cells = []
    for name, scale, digits in (
        ("steps_per_second", 1, 2),
        ("first_step", 1, 1),
        ("run", 1, 1),
        ("memory", 1e9, 2),
        ("eval_loss", 1, 3),
    ):
        for side in ("script", "pytorch"):
            value = statistics.median(run[name] for run in runs[side]) / scale
            cells.append(f"{value:9.{digits}f}")
        if name == "steps_per_second":
            pairs = zip(runs["script"], runs["pytorch"], strict=True)
            ratio = statistics.median(ours[name] / theirs[name] for ours, theirs in pairs)
            cells.append(f"{ratio:7.2f}")
    return "".join(cells)


def main():
    if sys.argv[1:2] == ["--child"]:
        run_pytorch(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=ROOT / ".venv-pytorch/bin/python", help="with PyTorch")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--sizes", nargs="+", choices=["small", "base"], default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--megabytes", type=float, default=1, help="size of the text")
    parser.add_argument("--product", type=int, default=2048, help="size of the large product")
    parser.add_argument("--gradient_checkpointing", default="auto", help="of the script")
    parser.add_argument("--compile", action="store_true", help="PyTorch uses torch.compile")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    import harness

    names = ("steps/s", "ratio", "first step", "run", "memory", "eval loss")
    print(f"{'':29}" + "".join(f"{name:>{7 if name == 'ratio' else 18}}" for name in names))
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        for objective in args.objectives:
            for size in args.sizes:
                for dtype in args.dtypes:
                    comparison = Comparison(args, Path(directory), objective, size, dtype)
                    runs = comparison.measure()
                    figures.append(
                        {"objective": objective, "size": size, "dtype": dtype, "runs": runs}
                    )
                    print(f"{objective:12}{size:7}{dtype:10}{report_line(runs)}", flush=True)
                    harness.write_json(args.json, figures)


if __name__ == "__main__":
    main()
