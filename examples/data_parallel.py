"""Data parallelism: batch split over eight devices, parameters on every one of them.

The optimizer needs to know nothing of it.  The loss is the mean over the whole batch,
so its gradient is, and so is the one that `sam` takes at the perturbed weights: there
is no axis name to pass and no all-reduce to write.  The same step runs on a mesh with
Auto axes, where the compiler finds the layout, and with Explicit ones, where it is part
of every array's type.
"""

import os

# More threads than simulated devices, which wait for one another.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from sklearn.datasets import load_digits

from basinax.optimizers import sam

# Simulated devices, set up before anything runs.  With eight real ones leave this out.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

STEPS, BATCH = 20, 256

Params = dict[str, jax.Array]

tx = optax.chain(sam(0.05), optax.adamw(1e-2))


def init() -> Params:
    """Draw a perceptron with one hidden layer."""
    rng = np.random.default_rng(0)
    return {
        "w1": jnp.asarray(rng.normal(0, 64**-0.5, (64, 48)), jnp.float32),
        "w2": jnp.asarray(rng.normal(0, 48**-0.5, (48, 10)), jnp.float32),
    }


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over all of the batch, wherever it lies."""
    logits = jnp.tanh(images @ params["w1"]) @ params["w2"]
    return jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10)))


@jax.jit
def train_step(
    params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """The step of a single device, unchanged."""
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(
        grads, state, params, value_fn=lambda p: loss_fn(p, images, labels)
    )
    return optax.apply_updates(params, updates), state, loss


def main() -> None:
    """Train on one device, then on both kinds of mesh, and compare."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)

    def train(mesh: jax.sharding.Mesh | None = None) -> tuple[Params, np.ndarray]:
        params, batch_layout = init(), None
        if mesh is not None:
            batch_layout = NamedSharding(mesh, jax.P("data"))
            params = jax.device_put(params, NamedSharding(mesh, jax.P()))
        state = tx.init(params)  # lies as the parameters do
        losses = []
        for step in range(STEPS):
            batch = np.random.default_rng(step).integers(len(images), size=BATCH)
            x, y = jax.device_put((images[batch], labels[batch]), batch_layout)
            params, state, loss = train_step(params, state, x, y)
            losses.append(float(loss))
        shards = [shard.data for shard in x.addressable_shards]
        print(
            f"{'one device' if mesh is None else mesh.axis_types[0]}: {len(shards)} x "
            f"{len(shards[0])} samples, loss {losses[0]:.5f} -> {losses[-1]:.5f}"
        )
        return params, np.array(losses)

    expected, expected_losses = train()
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            params, losses = train(mesh)
        # Sums over the batch in another order: float32 rounding, which Adam's division
        # by small second moments enlarges.
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for name, leaf in params.items():
            assert leaf.is_fully_replicated
            np.testing.assert_allclose(leaf, expected[name], atol=1e-5)
    print(
        f"Checked: over {STEPS} steps, losses on eight devices are those of a single "
        "one, and so are parameters, to 1e-5, on both kinds of mesh."
    )


if __name__ == "__main__":
    main()
