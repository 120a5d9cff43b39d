"""Log the sharpness while training, and plot it beside the edge of stability.

`monitor` measures inside the compiled step, every n-th time, and keeps the latest
values in the optimizer's state; the loop reads them with `optax.tree.get` and writes
them wherever it logs.  Full-batch gradient descent with learning rate η is the case to
watch: the sharpness rises until it hovers about 2/η.
"""

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from basinax.landscape import metrics, monitor, plots

STEPS, EVERY, RATE = 800, 10, 0.4

Params = dict[str, jax.Array]


class Writer:
    """Write one JSON object per line.

    In its place `wandb.init(...)`, whose `log` has this signature, or tensorboardX:
    `for name, value in values.items(): SummaryWriter().add_scalar(name, value, step)`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def log(self, values: dict[str, Any], step: int) -> None:
        """Append a line."""
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        with self.path.open("a") as file:
            print(json.dumps(row), file=file)


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean square error to one-hot labels."""
    outputs = jnp.tanh(images @ params["w1"]) @ params["w2"]
    return jnp.mean(jnp.sum(jnp.square(outputs - jax.nn.one_hot(labels, 10)), axis=-1))


tx = optax.chain(
    monitor(
        {"sharpness": metrics.lambda_max(), "gradient_norm": metrics.gradient_norm()},
        every=EVERY,
    ),
    optax.sgd(RATE),
)


@jax.jit
def train_step(
    params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """One step; curvature needs the loss as a function of the parameters."""
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(
        grads, state, params, value_fn=lambda p: loss_fn(p, images, labels)
    )
    return optax.apply_updates(params, updates), state, loss


def main() -> None:
    """Train, log, plot, and check what is on disk."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16)[:200].astype(np.float32), labels[:200]
    images -= np.mean(images, axis=0, keepdims=True)
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(0, 1 / 16, (64, 32)), jnp.float32),
        "w2": jnp.asarray(rng.normal(0, 1 / 16, (32, 10)), jnp.float32),
    }
    state = tx.init(params)

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(pathlib.Path(folder, "log.jsonl"))
        for step in range(STEPS):
            params, state, loss = train_step(params, state, images, labels)
            if step % EVERY == 0:  # only then are there new values
                names = ("sharpness", "gradient_norm")
                seen = {name: optax.tree.get(state, name) for name in names}
                writer.log({"loss": loss} | seen, step=step)

        rows = [json.loads(line) for line in writer.path.read_text().splitlines()]
        steps, sharpness = ([row[k] for row in rows] for k in ("step", "sharpness"))
        axis = plots.monitored(steps, sharpness, threshold=2 / RATE)
        axis.set_ylabel("sharpness")
        picture = pathlib.Path(folder, "sharpness.png")
        axis.figure.savefig(picture)
        assert picture.stat().st_size > 1000

    for row in rows[:: len(rows) // 4]:
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    late = np.mean(sharpness[-10:])
    assert steps == list(range(0, STEPS, EVERY))
    assert sharpness[0] < 1 / RATE, "training starts far below the edge"
    assert abs(late * RATE / 2 - 1) < 0.2, late
    print(
        f"Checked: the sharpness rises from {sharpness[0]:.2f} to {late:.2f}, the edge "
        f"of stability 2/η = {2 / RATE:.0f} within a fifth."
    )


if __name__ == "__main__":
    main()
