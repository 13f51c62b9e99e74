"""Parameters for tests of gradients, and a check of gradients that recompute activations."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def random_params(model):
    """Make parameters that all have an effect.

    Initialized parameters would have biases of zero and scales of one.
    """
    rng = np.random.default_rng(0)
    params = {}
    for path, x in flatten_dict(model.params_shape_tree).items():
        mean = np.float32(path[-1] == "scale")
        params[path] = mean + 0.1 * rng.standard_normal(x.shape, np.float32)
    return jax.tree.map(jnp.asarray, unflatten_dict(params))


def check_recomputed_gradients(loss_fn, recomputing_loss_fn, params, rtol: float):
    """Check that recomputation draws the same dropout masks. Others would give other gradients.

    Both functions take parameters and a key, and return a loss.
    """

    def gradients(function, seed: int) -> dict:
        key = jax.random.key(seed, impl="rbg")
        return flatten_dict(jax.jit(jax.grad(function))(params, key))

    expected = gradients(loss_fn, 0)
    others = gradients(loss_fn, 1)
    found = gradients(recomputing_loss_fn, 0)
    largest = max(float(jnp.abs(value).max()) for value in expected.values())
    changes = [float(jnp.abs(others[path] - value).max()) for path, value in expected.items()]
    assert max(changes) > 1e-3 * largest
    for path, value in expected.items():
        np.testing.assert_allclose(
            found[path], value, rtol=rtol, atol=0.1 * rtol * largest, err_msg=str(path)
        )
