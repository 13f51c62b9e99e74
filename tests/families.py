"""The families of models that the scripts train, with the settings of a tiny model of each."""

from training_scripts import SCRIPTS, Place, tiny_model

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
MASKED = {
    "albert": {**ENCODER, "embedding_size": 24, "num_hidden_groups": 1},
    "bart": SEQ2SEQ,
    "bert": ENCODER,
    "big_bird": {**ENCODER, "attention_type": "original_full"},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 37,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "electra": {**ENCODER, "embedding_size": 24},
    "mbart": SEQ2SEQ,
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "roformer": {**ENCODER, "embedding_size": 24},
    "xlm-roberta": ENCODER,
}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
CAUSAL_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
CAUSAL = {
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 37,
        "max_position_embeddings": 40,
        **DROPOUT,
    },
    "bert": CAUSAL_ENCODER,
    "big_bird": CAUSAL_ENCODER,
    "bloom": {
        "hidden_size": 32,
        "n_layer": 1,
        "n_head": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "electra": {**CAUSAL_ENCODER, "embedding_size": 24},
    "gemma": LLAMA,
    "gpt2": GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gptj": {**GPT2, "rotary_dim": 8},
    "llama": LLAMA,
    "mistral": LLAMA,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 37,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "roberta": CAUSAL_ENCODER,
    "roberta-prelayernorm": CAUSAL_ENCODER,
    "xglm": {
        "d_model": 32,
        "num_layers": 1,
        "attention_heads": 2,
        "ffn_dim": 37,
        "max_position_embeddings": 40,
        **DROPOUT,
    },
    "xlm-roberta": CAUSAL_ENCODER,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
SPAN_MASKED = {
    "t5": T5,
    "t5, version 1.1": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5,
    "longt5, local": {**T5, "encoder_attention_type": "local", "local_radius": 4},
    "longt5, transient-global": {
        **T5,
        "encoder_attention_type": "transient-global",
        "local_radius": 4,
        "global_block_size": 4,
    },
}
DENOISING = dict.fromkeys(("bart", "mbart"), SEQ2SEQ)
# {script: {family: settings of its tiny config}}. A family has the name of its configuration in
# Transformers, which a comma and a variant may follow.
FAMILIES = {
    "run_mlm_flax.py": MASKED,
    "run_mlm_flax_stream.py": MASKED,
    "run_clm_flax.py": {
        **CAUSAL,
        "gpt-sw3": CAUSAL["gpt2"],
    },
    "run_t5_mlm_flax.py": SPAN_MASKED,
    "run_bart_dlm_flax.py": DENOISING,
}
CASES = [(script, family) for script in SCRIPTS for family in FAMILIES[script.name]]
# The last column of the table in docs/models.md.
NOTES = {
    "bloom": "`n_head` must be a power of two",
    "gemma": "`rope_theta` 10000, no `rope_scaling`",
    "gptj": "`rotary_dim` must be even, and at most the size of a head; no `tie_word_embeddings`",
    "llama": "as `gemma`; no `tie_word_embeddings`, `mlp_bias`; "
    "`head_dim` is `hidden_size / num_attention_heads`",
    "mistral": "as `llama`; sequences no longer than `sliding_window`",
    "roformer": "gets an `embedding_size` of `hidden_size`",
    "bert": "causal: gets `is_decoder`, as all encoders do",
    "big_bird": "masked: gets full attention with `--line_by_line`, with up to 11 blocks, or if "
    "the length is no multiple of a block; causal: always",
    "gpt-sw3": "its configuration is GPT-2's",
    "mbart": "denoising: the objective of BART, in one language",
}
# {column of the table: scripts}
COLUMNS = {
    "masked": ("run_mlm_flax.py", "run_mlm_flax_stream.py"),
    "causal": ("run_clm_flax.py",),
    "span-masked": ("run_t5_mlm_flax.py",),
    "denoising": ("run_bart_dlm_flax.py",),
}


def configure(place: Place, family: str):
    """Write the configuration of a tiny model with the family's default dropout and attention."""
    settings = FAMILIES[place.script.name][family]
    settings = {name: value for name, value in settings.items() if "drop" not in name}
    # BigBird's sparse attention needs longer texts.
    settings.pop("attention_type", None)
    write_model = tiny_model(family.partition(",")[0], place.script.num_sentinels, **settings)
    write_model(place.model)


def table() -> str:
    """Return the table of families in Markdown, for docs/generate.py.

    Those that it marks are tested by `test_family`.
    """
    tested = {}
    for column, scripts in COLUMNS.items():
        names = [family for script in scripts for family in FAMILIES[script]]
        tested[column] = {name.partition(",")[0] for name in names}
    lines = [
        f"| `--model_type` | {' | '.join(COLUMNS)} | note |",
        "|---|" + ":---:|" * len(COLUMNS) + "---|",
    ]
    for family in sorted(set().union(*tested.values())):
        marks = ["✓" if family in families else "" for families in tested.values()]
        lines.append(f"| `{family}` | {' | '.join(marks)} | {NOTES.get(family, '')} |")
    return "\n".join(lines)
