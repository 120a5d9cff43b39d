"""Two processes that train one model, as on two hosts of a cluster.

The script starts itself twice.  Each process knows its own half of every batch only,
and `make_array_from_process_local_data` makes global arrays of the halves; from there
on the step is that of a single device.  On a cluster start the same program once per
host, and `jax.distributed.initialize()` usually finds its arguments by itself.
"""

import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from sklearn.datasets import load_digits

from basinax.optimizers import perp_adamw

jax.config.update("jax_platforms", "cpu")  # leave out these two lines on accelerators
jax.config.update("jax_cpu_collectives_implementation", "gloo")

PROCESSES, STEPS, BATCH, TIMEOUT = 2, 20, 256, 120  # seconds

tx = perp_adamw(1e-2, weight_decay=0.1)


def loss_fn(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over the global batch."""
    logits = jnp.tanh(images @ params["w1"]) @ params["w2"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@jax.jit
def train_step(
    params: dict, state: optax.OptState, images: jax.Array, labels: jax.Array
) -> tuple[dict, optax.OptState, jax.Array]:
    """The step of a single device, unchanged."""
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train() -> dict[str, np.ndarray]:
    """Train with all processes that there are; return losses and parameters."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    rng = np.random.default_rng(0)  # every process draws the same numbers
    weights = {"w1": rng.normal(size=(64, 48)) / 8, "w2": rng.normal(size=(48, 10)) / 7}
    replicated, split = NamedSharding(mesh, jax.P()), NamedSharding(mesh, jax.P("data"))
    params = jax.device_put(jax.tree.map(np.float32, weights), replicated)
    state, losses = tx.init(params), []
    for _ in range(STEPS):
        batch = rng.integers(len(images), size=BATCH)
        share = np.split(batch, jax.process_count())[jax.process_index()]
        local = (images[share], labels[share])
        x, y = jax.make_array_from_process_local_data(split, local)
        assert x.shape == (BATCH, 64)  # although this process has a share of it only
        params, state, loss = train_step(params, state, x, y)
        losses.append(float(loss))
    # Replicated arrays lie in every process, which can look at its own copy.
    return {"losses": np.array(losses)} | jax.tree.map(np.asarray, params)


def worker(port: str, index: str, result: str) -> None:
    """Be one of the processes."""
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, int(index))
    np.savez(result, **train())
    jax.distributed.shutdown()


def run_workers(folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    """Start the processes, wait for their results, and leave none behind."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))  # any free port
        port = str(probe.getsockname()[1])
    results = [folder / f"{index}.npz" for index in range(PROCESSES)]
    command = [sys.executable, __file__, port]
    workers = [
        subprocess.Popen([*command, str(i), str(path)])
        for i, path in enumerate(results)
    ]
    try:
        codes = [worker.wait(TIMEOUT) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()  # does nothing to one that has ended
            worker.wait()
    assert not any(codes), f"exit codes {codes}, see the output above"
    return [dict(np.load(path)) for path in results]


def main() -> None:
    """Train with two processes and with this one, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_workers(pathlib.Path(folder))
    expected = train()
    for who, result in [("two processes", found[0]), ("one process", expected)]:
        print(f"{who}: loss {result['losses'][0]:.6f} -> {result['losses'][-1]:.6f}")
    for name, values in expected.items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        # Sums over the batch in another order: float32 rounding, which Adam's division
        # by small second moments enlarges.
        np.testing.assert_allclose(found[0][name], values, rtol=1e-5, atol=1e-5)
    print(
        f"Checked: over {STEPS} steps, losses and parameters of {PROCESSES} processes "
        "are the same in both and those of a single one to 1e-5."
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        worker(*sys.argv[1:])
    else:
        main()
