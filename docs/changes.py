"""The worked changes of docs/customizing.md, as replacements in run_mlm_flax.py.

Each change is a list of pairs: text that occurs exactly once in the script, and what replaces it.
`docs/generate.py` finds the text, applies the replacements and writes the diff, so line numbers and
context lines are never edited by hand. If a text is no longer in the script, change it here.
"""

NOUNS = [
    (
        """\
        self.is_special = np.isin(vocabulary, self.tokenizer.all_special_ids)
""",
        """\
        self.is_special = np.isin(vocabulary, self.tokenizer.all_special_ids)
        # Predict only words of nouns.txt that are one token. In RoBERTa, the space is part of it.
        nouns = Path("nouns.txt").read_text(encoding="utf-8").split()
        encoded = self.tokenizer([f" {noun}" for noun in nouns], add_special_tokens=False)
        noun_ids = [ids[0] for ids in encoded["input_ids"] if len(ids) == 1]
        self.is_special |= ~np.isin(vocabulary, noun_ids)
""",
    ),
]

MASKING = [
    (
        """\
        if self.whole_words:
            # The tokens of a word are predicted together. This is enough for words of 9 tokens.
            deviation *= 3
""",
        """\
        # The tokens of a span are predicted together.
        deviation *= 3
""",
    ),
    (
        """\
        choice_draws, replacement_draws = draws.T
""",
        """\
        choice_draws, replacement_draws = draws.T
        # Three neighbors share the draw of the first.
        first_of_span = choice_draws.reshape(num_rows, length)[:, ::3]
        choice_draws = np.repeat(first_of_span, 3, axis=1)[:, :length].ravel()
""",
    ),
]

SCHEDULE = [
    (
        """"constant", "inverse_sqrt"] = HfArg(""",
        """"constant", "inverse_sqrt", "trapezoid"] = HfArg(""",
    ),
    (
        """\
        decay = optax.constant_schedule(peak)
""",
        """\
        decay = optax.constant_schedule(peak)
    elif args.lr_scheduler_type == "trapezoid":

        def decay(step):
            return peak * jnp.minimum(1, 5 * (1 - step / decay_steps))

""",
    ),
]

SOURCE = [
    (
        "def load_text_files(",
        '''\
def read_rows(file: str, changed: int):
    """Generate the texts of an SQLite file. `changed`, its time of change, is for the cache."""
    import sqlite3

    for (text,) in sqlite3.connect(file).execute("SELECT body FROM articles ORDER BY id"):
        yield {"text": text}


def load_text_files(''',
    ),
    (
        """\
    for file in files:
        if data_extension(file) not in LOADERS:
""",
        """\
    if files[0].endswith(".sqlite"):
        with input_errors(f"{source}: cannot be read"):
            rows = {"file": files[0], "changed": Path(files[0]).stat().st_mtime_ns}
            return datasets.Dataset.from_generator(read_rows, gen_kwargs=rows, **load_options)
    for file in files:
        if data_extension(file) not in LOADERS:
""",
    ),
]

# The name of a change in the marker of its block, and its replacements.
CHANGES = {"nouns": NOUNS, "masking": MASKING, "schedule": SCHEDULE, "source": SOURCE}
