"""Schedules, optimizers and training step of run_mlm_flax.py against formulas and plain loops."""

import math
from argparse import Namespace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from training_scripts import full_but
from transformers import BartConfig, BertConfig, FlaxAutoModelForMaskedLM, RobertaConfig

import run_mlm_flax as mlm

DEFAULTS = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "adafactor": False,
    "max_grad_norm": 0.0,
}
TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
TINY_BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_optimizer(num_steps: int = 100, **settings):
    args = Namespace(**{**DEFAULTS, **settings})
    schedule = mlm.make_schedule(args, num_steps)
    return mlm.make_optimizer(args, schedule), schedule


def random_params(model, seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {}
    for path, x in flatten_dict(model.params_shape_tree).items():
        mean = np.float32(path[-1] == "scale")
        params[path] = jnp.asarray(mean + 0.1 * rng.standard_normal(x.shape, np.float32))
    return unflatten_dict(params)


# ---------------------------------------------------------------------------------------- schedules


def learning_rate(kind: str, step: int, peak: float, warmup: int, total: int) -> float:
    """The schedules that `transformers.optimization` documents, get_*_schedule_with_warmup."""
    if step < warmup:
        return peak * step / warmup
    if kind == "constant":
        return peak
    if kind == "inverse_sqrt":
        timescale = warmup or 10_000
        return peak / math.sqrt((step - warmup + timescale) / timescale)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return peak * max(0.0, 1 - progress)
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (10, 50), (1, 2), (49, 50), (60, 50)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_schedule(kind, warmup, total):
    _, schedule = make_optimizer(
        total, learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup
    )
    for step in range(total + 1):
        expected = learning_rate(kind, step, 3e-4, warmup, total)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-10), step
    if kind in ("linear", "cosine") and warmup < total:
        assert float(schedule(total)) == pytest.approx(0, abs=1e-10)


# ---------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("adafactor", [False, True])
@pytest.mark.parametrize(
    "config_class", full_but([BertConfig, RobertaConfig, BartConfig], RobertaConfig, BartConfig)
)
def test_weight_decay_leaves_out_biases_and_scales(config_class, adafactor):
    """With gradients of zero, parameters change by weight decay alone.

    Each step multiplies those that decay by 1 - learning rate * weight decay.
    """
    model = FlaxAutoModelForMaskedLM.from_config(config_class(**TINY, **TINY_BART), _do_init=False)
    params = random_params(model)
    settings = {
        "learning_rate": 0.5,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "adafactor": adafactor,
    }
    optimizer, _ = make_optimizer(4, **settings)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optimizer.init(params)
    decayed = params
    for _ in range(3):
        updates, state = optimizer.update(zeros, state, decayed)
        decayed = optax.apply_updates(decayed, updates)
    factor = np.prod([1 - 0.1 * 0.5 * share for share in (1, 0.75, 0.5)])
    decays = set()
    for path, before in flatten_dict(params).items():
        after = flatten_dict(decayed)[path]
        if path[-1] in ("bias", "scale", "final_logits_bias"):
            np.testing.assert_array_equal(after, before, err_msg=str(path))
        else:
            np.testing.assert_allclose(after, before * factor, rtol=1e-5, err_msg=str(path))
            decays.add(path[-1])
    assert decays == {"kernel", "embedding"}


def test_weight_decay_leaves_out_the_attention_bias_of_t5():
    """Its table of relative positions is a matrix of biases."""
    table = {"embedding": jnp.ones((3, 2))}
    params = {"shared": table, "attention": {"relative_attention_bias": table}}
    optimizer, _ = make_optimizer(4, learning_rate=0.5, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert jnp.all(updates["shared"]["embedding"] < 0)
    assert jnp.all(updates["attention"]["relative_attention_bias"]["embedding"] == 0)


@pytest.mark.parametrize(
    ("epochs", "num_steps"), [(0.07, 7), (0.55, 55), (0.071, 8), (1, 100), (1e-9, 1)]
)
def test_steps_of_a_fraction_of_an_epoch(epochs, num_steps):
    """0.07 * 100 is 7.000000000000001 in floating point, and means 7."""
    args = Namespace(
        do_train=True,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=1,
        max_steps=-1,
        num_train_epochs=epochs,
    )
    batch_size = jax.device_count()
    sequences = range(100 * batch_size)
    assert mlm.plan_steps(args, sequences) == (batch_size, 100, num_steps)
    args.num_train_epochs = 1e308
    with pytest.raises(mlm.InputError, match=r"--num_train_epochs .*: more than"):
        mlm.plan_steps(args, sequences)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adamw(max_grad_norm):
    """Compare with algorithm 2 of Loshchilov and Hutter in float64, for four steps.

    See https://arxiv.org/abs/1711.05101. The learning rate of the first step is 0.
    """
    beta1 = 0.8
    beta2 = 0.95
    epsilon = 1e-6
    weight_decay = 0.1
    peak = 0.05
    optimizer, _ = make_optimizer(
        10,
        learning_rate=peak,
        lr_scheduler_type="linear",
        warmup_steps=1,
        weight_decay=weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=epsilon,
        max_grad_norm=max_grad_norm,
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 7), "bias": (7,), "scale": (3,), "embedding": (11, 2)}
    exact = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in exact.items()}
    m = {name: np.zeros(shape) for name, shape in shapes.items()}
    v = {name: np.zeros(shape) for name, shape in shapes.items()}
    state = optimizer.init(params)
    for step in range(4):
        grads = {name: 10.0**-step * rng.standard_normal(shape) for name, shape in shapes.items()}
        grads32 = {name: jnp.asarray(grad, jnp.float32) for name, grad in grads.items()}
        updates, state = optimizer.update(grads32, state, params)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum((grad**2).sum() for grad in grads.values()))
        scale = min(1, max_grad_norm / norm) if max_grad_norm else 1
        rate = learning_rate("linear", step, peak, 1, 10)
        for name, grad in grads.items():
            m[name] = beta1 * m[name] + (1 - beta1) * grad * scale
            v[name] = beta2 * v[name] + (1 - beta2) * (grad * scale) ** 2
            m_hat = m[name] / (1 - beta1 ** (step + 1))
            v_hat = v[name] / (1 - beta2 ** (step + 1))
            decay = weight_decay if name in ("kernel", "embedding") else 0
            update = m_hat / (np.sqrt(v_hat) + epsilon) + decay * exact[name]
            exact[name] = exact[name] - rate * update
            np.testing.assert_allclose(
                params[name], exact[name], rtol=1e-4, atol=1e-6, err_msg=f"{step} {name}"
            )


def test_adafactor_scales_with_the_parameter():
    """The step is relative, as in section 8 of Shazeer and Stern (https://arxiv.org/abs/1804.04235).

    The root mean square of the first update is the learning rate times that of the parameter.
    """
    optimizer, _ = make_optimizer(learning_rate=0.01, adafactor=True)
    params = {"kernel": jnp.full((4, 6), 3.0), "bias": jnp.full((6,), 0.5)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, 7.0), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], np.full((4, 6), -0.03), rtol=1e-4)
    np.testing.assert_allclose(updates["bias"], np.full((6,), -0.005), rtol=1e-4)


def test_adafactor_has_the_same_state_with_and_without_decay():
    """The state is the same, so a checkpoint can be resumed with another --weight_decay."""
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    with_decay = make_optimizer(adafactor=True, weight_decay=0.01)[0].init(params)
    without = make_optimizer(adafactor=True, weight_decay=0.0)[0].init(params)
    assert jax.tree.structure(with_decay) == jax.tree.structure(without)
    assert jax.tree.map(jnp.shape, with_decay) == jax.tree.map(jnp.shape, without)


# ------------------------------------------------------------------------------------ training step

ROWS = 64
LENGTH = 16
STEPS = 20
# At most this many tokens of a row are predicted.
MAX_PREDICTED = 10


def uneven_batches():
    """Yield global batches in which predicted tokens are distributed unevenly.

    The first eighth of the rows has most of them, the second eighth has none. So the mean of the
    devices' or the micro-batches' means is far from the mean over the tokens.
    """
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        input_ids = rng.integers(2, 101, (ROWS, LENGTH), dtype=np.int32)
        lengths = rng.integers(LENGTH // 2, LENGTH + 1, ROWS)
        attention_mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
        input_ids[attention_mask == 0] = 1
        labels = np.full((ROWS, LENGTH), -100, np.int32)
        for row in range(ROWS):
            if row < 8:
                most = MAX_PREDICTED
            elif row < 16:
                most = 0
            else:
                most = 1
            count = min(most, lengths[row])
            where = rng.permutation(lengths[row])[:count]
            # The first rows are easy to learn, the others are not.
            labels[row, where] = 7 if row < 8 else rng.integers(0, 101, count)
        yield {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture(scope="module")
def model():
    config = RobertaConfig(**TINY, **NO_DROPOUT, pad_token_id=1)
    return FlaxAutoModelForMaskedLM.from_config(config, _do_init=False)


SETTINGS = {
    "learning_rate": 5e-3,
    "weight_decay": 0.01,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def plain_run(model):
    """The history and the last parameters of the plainest program, which runs on one device.

    The head runs on every position, and the loss is the mean over the predicted tokens of a batch.
    The history has a row for each step: loss, gradient norm, predicted tokens, tokens.
    """
    optimizer, _ = make_optimizer(STEPS, **SETTINGS)

    def mean_loss(params, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, params=params, train=False).logits
        predicted = batch["labels"] != -100
        # The one-hot vector of -100 is zero.
        one_hot = jax.nn.one_hot(batch["labels"], logits.shape[-1])
        return -(jax.nn.log_softmax(logits) * one_hot).sum() / predicted.sum()

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        norm = jnp.sqrt(sum((grad**2).sum() for grad in jax.tree.leaves(grads)))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (loss, norm)

    params = random_params(model)
    state = optimizer.init(params)
    history = []
    for batch in uneven_batches():
        params, state, (loss, norm) = step(params, state, batch)
        num_predicted = (batch["labels"] != -100).sum()
        num_tokens = batch["attention_mask"].sum()
        history.append((float(loss), float(norm), num_predicted, num_tokens))
    return np.array(history), params


def num_slots(num_tokens: int) -> int:
    return min(num_tokens, num_tokens * MAX_PREDICTED // LENGTH)


def make_p_train_step(model, num_devices: int):
    loss_fn = partial(mlm.loss_sums, model=model, num_slots=num_slots)
    schedule = mlm.make_schedule(Namespace(**{**DEFAULTS, **SETTINGS}), STEPS)
    step = partial(mlm.train_step, loss_fn=loss_fn, schedule=schedule, seed=42)
    return jax.pmap(step, "batch", devices=jax.devices()[:num_devices])


def replicated(tree, num_devices: int):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_devices, *jnp.shape(x))), tree)


NO_TOTALS = dict.fromkeys(
    ("loss", "predicted", "tokens", "grad_norm", "learning_rate"), np.float32(0)
)


@pytest.mark.parametrize(
    ("num_devices", "accumulation"), full_but([(1, 1), (8, 1), (8, 4)], (1, 1), (8, 4))
)
def test_step_on_any_layout_equals_the_plain_program(model, plain_run, num_devices, accumulation):
    history, expected_params = plain_run
    assert len(jax.devices()) == 8
    # The model learns. Otherwise equal losses would mean little.
    assert history[-1, 0] < 0.7 * history[0, 0]
    optimizer, _ = make_optimizer(STEPS, **SETTINGS)
    state = TrainState.create(apply_fn=None, params=random_params(model), tx=optimizer)
    state = replicated(state, num_devices)
    no_totals = replicated(NO_TOTALS, num_devices)
    totals = no_totals
    p_train_step = make_p_train_step(model, num_devices)
    shape = (num_devices, accumulation, ROWS // num_devices // accumulation, LENGTH)
    for step, batch in enumerate(uneven_batches()):
        # Totals are sums over the steps between two log lines, here three.
        before = totals if step % 3 else no_totals
        shards = {name: x.reshape(shape) for name, x in batch.items()}
        state, totals = p_train_step(state, before, shards)
        sums = {name: float(totals[name][0] - before[name][0]) for name in NO_TOTALS}
        loss, norm, predicted, tokens = history[step]
        assert (sums["predicted"], sums["tokens"]) == (predicted, tokens)
        assert sums["loss"] / predicted == pytest.approx(loss, rel=1e-4, abs=0), step
        assert sums["grad_norm"] == pytest.approx(norm, rel=1e-3), step
    assert int(state.step[0]) == STEPS
    for path, expected in flatten_dict(expected_params).items():
        for device in range(num_devices):
            actual = flatten_dict(state.params)[path][device]
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3, err_msg=str(path))


def test_dropout_depends_on_step_device_and_micro_batch_alone():
    """Only dropout differs: all rows are the same, and the learning rate is zero."""
    config = RobertaConfig(
        **TINY, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, pad_token_id=1
    )
    model = FlaxAutoModelForMaskedLM.from_config(config, _do_init=False)
    state = TrainState.create(apply_fn=None, params=random_params(model), tx=optax.sgd(0.0))
    row = {name: x[:1] for name, x in next(uneven_batches()).items()}

    def losses(device: int, micro_batch: int, num_steps: int = 1):
        """Losses of steps in which only this micro-batch of this device has predicted tokens."""
        batch = {name: np.tile(x, (2, 2, 1, 1)) for name, x in row.items()}
        labels = np.full_like(batch["labels"], -100)
        labels[device, micro_batch] = batch["labels"][0, 0]
        batch["labels"] = labels
        found = []
        current = replicated(state, 2)
        for _ in range(num_steps):
            current, totals = p_train_step(current, replicated(NO_TOTALS, 2), batch)
            found.append(float(totals["loss"][0]))
        return found

    p_train_step = make_p_train_step(model, 2)
    first = losses(0, 0, num_steps=3)
    assert first == losses(0, 0, num_steps=3)
    assert len({*first, *losses(0, 1), *losses(1, 0), *losses(1, 1)}) == 6
