"""Hyperparameters that live in the optimizer's state: read, log and change them.

`optax.inject_hyperparams` evaluates schedules into the state, where learning rate and
threshold of SPECTRA can be logged, and set by hand without another compilation.
Arguments that are fixed when a program is compiled go to `static_args`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from basinax.optimizers import decayed_threshold, spectra_adamw

STEPS, EVERY, BATCH = 120, 20, 128

Params = dict[str, jax.Array]

learning_rate = optax.warmup_cosine_decay_schedule(0.0, 2e-2, 20, STEPS)
threshold = decayed_threshold(2.0, STEPS, fraction=0.5, final_scale=0.1)
tx = optax.inject_hyperparams(spectra_adamw, static_args=("warmup_steps",))(
    learning_rate, threshold, weight_decay=0.1
)


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    logits = jnp.tanh(images @ params["w1"]) @ params["w2"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@jax.jit
def train_step(
    params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """One step."""
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def is_number(path: Any, value: Any) -> bool:
    """Tell a hyperparameter from the state of its schedule, which has the same name."""
    del path
    return isinstance(value, jax.Array)


def main() -> None:
    """Train, log, and check the log against the schedules."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(0, 1 / 8, (64, 48)), jnp.float32),
        "w2": jnp.asarray(rng.normal(0, 1 / 7, (48, 10)), jnp.float32),
    }
    state = tx.init(params)

    log = []
    for step in range(STEPS):
        if step == STEPS // 2:
            state = optax.tree.set(state, is_number, weight_decay=jnp.float32(0.5))
        batch = rng.integers(len(images), size=BATCH)
        params, state, loss = train_step(params, state, images[batch], labels[batch])
        if step % EVERY == 0:
            row = {"step": step, "loss": float(loss)} | {
                name: float(optax.tree.get(state, name, filtering=is_number))
                for name in ("learning_rate", "threshold", "weight_decay")
            }
            log.append(row)
            print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))

    for row in log:
        np.testing.assert_allclose(row["learning_rate"], learning_rate(row["step"]))
        np.testing.assert_allclose(row["threshold"], threshold(row["step"]))
    assert [row["weight_decay"] for row in log] == [np.float32(0.1)] * 3 + [0.5] * 3
    assert train_step._cache_size() == 1
    assert log[-1]["loss"] < 0.25 * log[0]["loss"]
    print(
        f"Checked: {len(log)} logged learning rates and thresholds are those of the "
        "schedules, and a new weight decay needed no second compilation."
    )


if __name__ == "__main__":
    main()
