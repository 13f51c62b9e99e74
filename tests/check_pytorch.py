#!/usr/bin/env python
"""Does PyTorch read an exported folder as Flax does? The two libraries need two environments:

    python tests/check_pytorch.py models DIRECTORY    where Flax is: a folder for every family, its weights at random
    python tests/check_pytorch.py flax FOLDER ...     where Flax is: writes inputs and logits into each folder
    python tests/check_pytorch.py torch FOLDER ...    where PyTorch and Transformers 5 are: compares

A folder is one of `models`, or what a run has exported. The last command exits with 1 if a parameter is missing,
unexpected or of another shape, or if a logit is off by more than 1e-4. It also saves the model as PyTorch does, into
FOLDER/torch, for a `flax FOLDER/torch` and `torch FOLDER/torch` after it to see that these weights are read by Flax.
Not part of the test suite, which runs without PyTorch.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4
NOT_LEARNED = (
    "bert.pooler.",
    "roformer.encoder.embed_positions.",
)  # in PyTorch alone: not used here, and computed
SEQ2SEQ = ("t5", "mt5", "longt5")  # which shift nothing by themselves


def write_models(directory: str) -> None:
    """Each family of each script, through the script's own functions, with every parameter drawn at random."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict
    from safetensors.numpy import save_file
    from test_families import CASES, configure
    from training_scripts import Place

    for script, family in CASES:
        if script.is_stream:
            continue  # the same models as run_mlm_flax.py
        name = f"{script.name.removesuffix('.py')}-{family.replace(', ', '-')}"
        place = Place(script, Path(directory).absolute() / name)
        configure(place, family)
        trainer = importlib.import_module(script.name.removesuffix(".py"))
        getattr(trainer, "mend_clip", lambda: None)()
        args = trainer.parse_args(place.flags("none", model_type=family.partition(",")[0]))
        config, _, _ = trainer.load_config_and_tokenizer(args)
        model, params = trainer.load_model(args, config)
        rng, flat = np.random.default_rng(0), flatten_dict(params)
        drawn = {
            path: (path[-1] == "scale") + 0.2 * rng.standard_normal(x.shape)
            for path, x in sorted(flat.items())
        }
        params = unflatten_dict({path: np.float32(x) for path, x in drawn.items()})
        model.save_pretrained(place.model, params=params)
        save_file(
            trainer.to_pytorch(params), place.model / "model.safetensors", metadata={"format": "pt"}
        )
        print(f"jax {jax.__version__}: {place.model}")


def architecture(folder: Path) -> str:
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    return name.removeprefix("Flax")


def write_flax(folder: Path) -> bool:
    import jax
    import transformers

    name = architecture(folder)
    if any(family in name.lower() for family in SEQ2SEQ):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        importlib.import_module("run_t5_mlm_flax").mend_clip()
    read = getattr(
        transformers, f"Flax{name}", transformers.FlaxAutoModelForCausalLM
    )  # BERT has two names
    config = transformers.AutoConfig.from_pretrained(folder)
    if folder.name == "torch" and name.startswith(
        ("T5", "MT5")
    ):  # Transformers 5 says True, see run_t5_mlm_flax.py
        config.tie_word_embeddings = getattr(config, "scale_decoder_outputs", False)
    model = read.from_pretrained(folder, config=config)
    rng = np.random.default_rng(0)
    length = min(32, getattr(model.config, "max_position_embeddings", 64) // 2)
    input_ids = rng.integers(0, model.config.vocab_size, (4, length))
    input_ids[input_ids == model.config.pad_token_id] += (
        1  # models that number their positions skip the padding
    )
    attention_mask = (np.arange(length) < rng.integers(length // 2, length + 1, (4, 1))).astype(
        np.int64
    )
    attention_mask[0] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "token_type_ids" in inspect.signature(type(model).__call__).parameters:
        inputs["token_type_ids"] = np.zeros_like(
            input_ids
        )  # PyTorch's default; ELECTRA's in Flax is 1
    if any(family in name.lower() for family in SEQ2SEQ):
        inputs["decoder_input_ids"] = input_ids
    with jax.default_matmul_precision("float32"):
        logits = np.asarray(model(**inputs).logits)
    np.savez(
        folder / "logits.npz", input_ids=input_ids, attention_mask=attention_mask, logits=logits
    )
    print(
        f"jax {jax.__version__}, transformers {transformers.__version__}: {folder}: {type(model).__name__}"
    )
    return True


def compare_torch(folder: Path) -> bool:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    name = architecture(folder)
    read = getattr(
        transformers, name, transformers.AutoModelForCausalLM
    )  # BERT's is called BertLMHeadModel there
    model, loading = read.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    data = np.load(folder / "logits.npz")
    inputs = {name: torch.from_numpy(data[name]) for name in ("input_ids", "attention_mask")}
    if any(family in name.lower() for family in SEQ2SEQ):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.numpy()
    shown = data["attention_mask"] == 1  # what padding predicts is nobody's concern
    difference = float(np.abs(logits - data["logits"])[shown].max())
    problems = [
        f"{name}: {key}"
        for name, keys in loading.items()
        for key in keys
        if not str(key).startswith(NOT_LEARNED)
    ]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    largest = np.abs(data["logits"][shown]).max()
    print(
        f"{versions}: {folder}: {name}: logits up to {largest:.3g} differ by {difference:.2g} at most"
    )
    print(*sorted(problems), sep="\n", end="\n" if problems else "")
    if folder.name != "torch":
        model.save_pretrained(folder / "torch")
    return not problems and difference <= TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("models", "flax", "torch"))
    parser.add_argument(
        "folders", nargs="+", type=Path, help="exported: config.json, model.safetensors"
    )
    args = parser.parse_args(argv)
    if args.what == "models":
        return write_models(args.folders[0]) or 0
    passed = [
        (write_flax if args.what == "flax" else compare_torch)(folder) for folder in args.folders
    ]
    print(f"{sum(passed)} of {len(passed)} folders passed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
