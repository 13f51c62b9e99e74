#!/usr/bin/env python
"""Does PyTorch read an exported folder as Flax does? Two commands, as the two libraries need two environments:

    python tests/check_pytorch.py flax FOLDER logits.npz     where Flax is: writes inputs and logits
    python tests/check_pytorch.py torch FOLDER logits.npz    where PyTorch and Transformers 5 are: compares

The second one exits with 1 if a parameter is missing, unexpected or of another shape, or if a logit is off by more
than 1e-4. Not part of the test suite, which runs without PyTorch.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4
NOT_LEARNED = ("bert.pooler.", "roformer.encoder.embed_positions.")  # in PyTorch alone: not used here, and computed


def write_flax(folder: str, file: str) -> int:
    import jax
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    if "T5" in name:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        importlib.import_module("run_t5_mlm_flax").mend_clip()
    model = getattr(transformers, f"Flax{name}").from_pretrained(folder)
    rng = np.random.default_rng(0)
    length = min(32, getattr(model.config, "max_position_embeddings", 64) // 2)
    input_ids = rng.integers(0, model.config.vocab_size, (4, length))
    input_ids[input_ids == model.config.pad_token_id] += 1  # models that number their positions skip the padding
    attention_mask = (np.arange(length) < rng.integers(length // 2, length + 1, (4, 1))).astype(np.int64)
    attention_mask[0] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "token_type_ids" in inspect.signature(type(model).__call__).parameters:
        inputs["token_type_ids"] = np.zeros_like(input_ids)  # PyTorch's default; ELECTRA's in Flax is 1
    if "T5" in name:  # which shifts nothing by itself
        inputs["decoder_input_ids"] = input_ids
    with jax.default_matmul_precision("float32"):
        logits = np.asarray(model(**inputs).logits)
    np.savez(file, input_ids=input_ids, attention_mask=attention_mask, logits=logits)
    print(f"jax {jax.__version__}, transformers {transformers.__version__}: {type(model).__name__}, {logits.shape}")
    return 0


def compare_torch(folder: str, file: str) -> int:
    import torch
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model, loading = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    data = np.load(file)
    inputs = {name: torch.from_numpy(data[name]) for name in ("input_ids", "attention_mask")}
    if "T5" in name:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.numpy()
    shown = data["attention_mask"] == 1  # what padding predicts is nobody's concern
    difference = float(np.abs(logits - data["logits"])[shown].max())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}: {type(model).__name__}")
    problems = [
        f"{name}: {key}" for name, keys in loading.items() for key in keys if not str(key).startswith(NOT_LEARNED)
    ]
    print(*sorted(problems), sep="\n", end="\n" if problems else "")
    print(f"the logits, of {np.abs(data['logits'][shown]).max():.3g} at most, differ by {difference:.2g} at most")
    return int(bool(problems) or not difference <= TOLERANCE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("flax", "torch"))
    parser.add_argument("folder", help="an exported model: config.json, flax_model.msgpack, model.safetensors")
    parser.add_argument("logits", help="the .npz file to write (flax) or to read (torch)")
    args = parser.parse_args(argv)
    return (write_flax if args.library == "flax" else compare_torch)(args.folder, args.logits)


if __name__ == "__main__":
    sys.exit(main())
