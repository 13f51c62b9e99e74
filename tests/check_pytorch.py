#!/usr/bin/env python
"""Check that PyTorch reads an exported folder as Flax does.

The two libraries need two environments. The first two commands run where Flax is installed:

    python tests/check_pytorch.py models DIRECTORY    writes a folder of each family, random weights
    python tests/check_pytorch.py flax FOLDER ...     writes inputs and logits into each folder

The third one runs where PyTorch and Transformers 5 are installed:

    python tests/check_pytorch.py torch FOLDER ...    compares PyTorch's logits with Flax's

A folder is one that `models` writes, or that a run has exported. The last command exits with 1 if a
parameter is missing, unexpected or of another shape, or if a logit differs by more than 1e-4. It
also saves the model with PyTorch to FOLDER/torch. Run `flax FOLDER/torch` and `torch FOLDER/torch`
after it to check that Flax reads these weights. The test suite does not need PyTorch, so this is no
part of it.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4
# Parameters that PyTorch alone has. The first are not used here, the second are computed.
NOT_LEARNED = ("bert.pooler.", "roformer.encoder.embed_positions.")
# Models that need decoder inputs: they do not shift the inputs themselves.
SEQ2SEQ = ("t5", "mt5", "longt5")


def write_models(directory: str) -> None:
    """Write each family of each script with the script's own functions and random parameters."""
    import jax
    from families import CASES, configure
    from flax.traverse_util import flatten_dict, unflatten_dict
    from safetensors.numpy import save_file
    from training_scripts import Place

    for script, family in CASES:
        if script.is_stream:
            # Its models are those of run_mlm_flax.py.
            continue
        name = f"{script.name.removesuffix('.py')}-{family.replace(', ', '-')}"
        place = Place(script, Path(directory).absolute() / name)
        configure(place, family)
        trainer = importlib.import_module(script.name.removesuffix(".py"))
        getattr(trainer, "restore_clip_argument", lambda: None)()
        args = trainer.parse_args(place.flags("none", model_type=family.partition(",")[0]))
        config, _, _ = trainer.load_config_and_tokenizer(args)
        model, params = trainer.load_model(args, config)
        rng = np.random.default_rng(0)
        drawn = {}
        for path, x in sorted(flatten_dict(params).items()):
            is_scale = path[-1] == "scale"
            drawn[path] = np.float32(is_scale + 0.2 * rng.standard_normal(x.shape))
        params = unflatten_dict(drawn)
        model.save_pretrained(place.model, params=params)
        weights = place.model / "model.safetensors"
        save_file(trainer.to_pytorch(params), weights, metadata={"format": "pt"})
        print(f"jax {jax.__version__}: {place.model}")


def architecture(folder: Path) -> str:
    """The name of PyTorch's model class."""
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    return name.removeprefix("Flax")


def is_seq2seq(name: str) -> bool:
    return any(family in name.lower() for family in SEQ2SEQ)


def load_flax(folder: Path):
    import transformers

    name = architecture(folder)
    if is_seq2seq(name):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        importlib.import_module("run_t5_mlm_flax").restore_clip_argument()
    # The causal BERT has another class name in Flax than in PyTorch.
    model_class = getattr(transformers, f"Flax{name}", transformers.FlaxAutoModelForCausalLM)
    config = transformers.AutoConfig.from_pretrained(folder)
    if folder.name == "torch" and name.startswith(("T5", "MT5")):
        # Transformers 5 always writes True, see run_t5_mlm_flax.py.
        config.tie_word_embeddings = getattr(config, "scale_decoder_outputs", False)
    return model_class.from_pretrained(folder, config=config)


def make_inputs(model) -> dict[str, np.ndarray]:
    """Random rows. All but the first end in padding."""
    rng = np.random.default_rng(0)
    length = min(32, getattr(model.config, "max_position_embeddings", 64) // 2)
    input_ids = rng.integers(0, model.config.vocab_size, (4, length))
    # Models that number their positions would skip a pad token in the text.
    input_ids[input_ids == model.config.pad_token_id] += 1
    lengths = rng.integers(length // 2, length + 1, (4, 1))
    attention_mask = (np.arange(length) < lengths).astype(np.int64)
    attention_mask[0] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def write_flax(folder: Path) -> bool:
    """Write inputs, and the logits of Flax, to logits.npz."""
    import jax
    import transformers

    model = load_flax(folder)
    data = make_inputs(model)
    inputs = dict(data)
    if "token_type_ids" in inspect.signature(type(model).__call__).parameters:
        # The default of PyTorch. ELECTRA's default in Flax is 1.
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    if is_seq2seq(architecture(folder)):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with jax.default_matmul_precision("float32"):
        logits = np.asarray(model(**inputs).logits)
    np.savez(folder / "logits.npz", **data, logits=logits)
    versions = f"jax {jax.__version__}, transformers {transformers.__version__}"
    print(f"{versions}: {folder}: {type(model).__name__}")
    return True


def compare_torch(folder: Path) -> bool:
    """Compare the logits of PyTorch with those in logits.npz, and save the model with PyTorch."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    name = architecture(folder)
    # The causal BERT is called BertLMHeadModel in PyTorch.
    model_class = getattr(transformers, name, transformers.AutoModelForCausalLM)
    model, loading = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    data = np.load(folder / "logits.npz")
    inputs = {key: torch.from_numpy(data[key]) for key in ("input_ids", "attention_mask")}
    if is_seq2seq(name):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.numpy()

    # The logits of padding are never used.
    shown = data["attention_mask"] == 1
    expected = data["logits"]
    difference = float(np.abs(logits - expected)[shown].max())
    largest = np.abs(expected[shown]).max()
    problems = []
    for problem, keys in loading.items():
        for key in keys:
            if not str(key).startswith(NOT_LEARNED):
                problems.append(f"{problem}: {key}")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    result = f"logits up to {largest:.3g} differ by {difference:.2g} at most"
    print(f"{versions}: {folder}: {name}: {result}")
    for problem in sorted(problems):
        print(problem)
    if folder.name != "torch":
        model.save_pretrained(folder / "torch")
    return not problems and difference <= TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("models", "flax", "torch"))
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        help="Folders with config.json and model.safetensors. For models: where to write them.",
    )
    args = parser.parse_args(argv)
    if args.what == "models":
        write_models(args.folders[0])
        return 0
    check = write_flax if args.what == "flax" else compare_torch
    passed = [check(folder) for folder in args.folders]
    print(f"{sum(passed)} of {len(passed)} folders passed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
