"""PyTorch curvature tools on the same networks, as their own documents use them.

Importing this module imports torch; nothing else in the package does.
"""

import importlib
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from basinax.benchmarks._peers_problem import TOP, Contender, Problem, Settings, arpack

torch: Any = importlib.import_module("torch")
nn = torch.nn

# The cheapest settings with which all of several seeds reached 1e-3, found with the
# answer known: Lanczos steps, and the change at which a power iteration stops.
LANCZOS_STEPS = {"perceptron": 15, "convolutional": 13}
POWER_TOL = {"perceptron": 3e-5, "convolutional": 1e-4}


def network(problem: Problem) -> Any:
    """Build the network in torch, with its own layout of the same weights."""
    shapes = [problem.params[f"w{k}"].shape for k in range(len(problem.params) // 2)]
    if problem.name == "perceptron":
        (a, b), (_, c), (_, d) = shapes
        layers = [nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(c, d))
    else:
        (*_, a, b), (*_, c), (d, e), (_, f) = shapes
        layers = [nn.Unflatten(1, (a, 8, 8)), nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(d, e), nn.ReLU(), nn.Linear(e, f)]
        model = nn.Sequential(*layers)
    flat = np.asarray(ravel_pytree(problem.params)[0])[order(problem)]
    nn.utils.vector_to_parameters(torch.from_numpy(flat), model.parameters())
    return model


def order(problem: Problem) -> np.ndarray:
    """Return where in JAX's flat vector each entry of torch's stands."""
    flat, unravel = ravel_pytree(problem.params)
    indices = unravel(jnp.arange(flat.size, dtype=flat.dtype))  # exact below 2²⁴
    leaves, channels = [], 0  # of a convolution just before
    for layer in range(len(indices) // 2):
        w = np.asarray(indices[f"w{layer}"])
        if w.ndim == 4:  # height, width, in, out
            w, channels = w.transpose(3, 2, 0, 1), w.shape[3]
        else:
            if channels:  # inputs are pixels of channels, in torch channels of pixels
                rows = w.reshape(-1, channels, w.shape[1])
                w = rows.swapaxes(0, 1).reshape(w.shape)
            w, channels = w.T, 0
        leaves += [w.ravel(), np.asarray(indices[f"b{layer}"])]
    return np.concatenate(leaves).astype(np.int64)


class Bench(NamedTuple):
    """What every package is given.

    Attributes:
      name: of the network.
      model: the network; its weights are those of the problem.
      data: inputs and labels, one batch.
      vector: what to multiply, flat and in torch's order.
      back: brings a flat tensor into JAX's order.
      settings: how much of each task to do.
    """

    name: str
    model: Any
    data: tuple[Any, Any]
    vector: Any
    back: Callable[[Any], np.ndarray]
    settings: Settings


def gradient(bench: Bench) -> list[Contender]:
    """Make the gradient, the unit of everything else."""
    weights, criterion = list(bench.model.parameters()), nn.CrossEntropyLoss()
    x, y = bench.data

    def once(seed: int) -> None:
        del seed
        torch.autograd.grad(criterion(bench.model(x), y), weights)

    return [Contender("gradient", "torch", once, repeats=10)]


def pyhessian(bench: Bench) -> list[Contender]:
    """Make the tasks by PyHessian, on one batch, whose graph it keeps."""
    package: Any = importlib.import_module("pyhessian")
    product: Any = importlib.import_module("pyhessian.utils").hessian_vector_product
    settings, tol = bench.settings, POWER_TOL[bench.name]

    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)
        for weight in bench.model.parameters():
            weight.grad = None  # it would be added to
        with warnings.catch_warnings():  # of a reference cycle by create_graph
            warnings.simplefilter("ignore")
            return package.hessian(
                bench.model, nn.CrossEntropyLoss(), bench.data, cuda=False
            )

    def eig(matrix: Any, eigenvectors: bool) -> tuple[Any, Any]:
        """Stand in for `torch.eig`, which the released version calls and torch lost."""
        del eigenvectors  # always wanted
        values, vectors = torch.linalg.eigh(matrix)
        return values[:, None], vectors

    def density(seed: int) -> np.ndarray:
        with mock.patch.object(torch, "eig", eig, create=True):
            return np.asarray(fresh(seed).density(iter=settings.steps, n_v=1)[0][0])

    def total(seed: int) -> np.ndarray:
        samples = fresh(seed).trace(maxIter=settings.probes, tol=0.0)
        return np.array([np.mean(samples), np.nan])

    held: list[Any] = []

    def multiply(seed: int) -> np.ndarray:
        if not held:
            held.append(fresh(seed))
        (kept,) = held
        pieces = bench.vector.split([w.numel() for w in kept.params])
        vector = [v.view_as(w) for v, w in zip(pieces, kept.params, strict=True)]
        found = product(kept.gradsH, kept.params, vector)
        return bench.back(torch.cat([h.reshape(-1) for h in found]))

    def top(seed: int) -> np.ndarray:
        values = fresh(seed).eigenvalues(maxIter=1000, tol=tol, top_n=TOP)[0]
        return np.asarray(values)

    name = "PyHessian"
    return [
        Contender("product", f"{name}, kept graph", multiply, repeats=5),
        Contender("top-5", f"{name}, tol {tol:g}", top),
        Contender("trace", f"{name}, Hutchinson", total, settings.scale),
        Contender("density", name, density),
    ]


def eigenthings(bench: Bench) -> list[Contender]:
    """Make the tasks by hessian-eigenthings."""
    package: Any = importlib.import_module("hessian_eigenthings")
    loss, settings = package.supervised_loss(nn.CrossEntropyLoss()), bench.settings
    steps = LANCZOS_STEPS[bench.name]

    def fresh() -> Any:
        return package.HessianOperator(bench.model, [bench.data], loss)

    def top(seed: int) -> np.ndarray:
        found = package.lanczos(fresh(), k=TOP, max_iter=steps, which="LA", seed=seed)
        return found.eigenvalues.numpy()

    def total(seed: int) -> np.ndarray:
        found = package.hutchinson(fresh(), num_samples=settings.probes, seed=seed)
        return np.array([found.estimate, found.stderr])

    def split(seed: int) -> np.ndarray:
        found = package.hutch_plus_plus(fresh(), num_matvecs=settings.budget, seed=seed)
        return np.array([found.estimate, found.stderr])

    def density(seed: int) -> np.ndarray:
        found = package.spectral_density(
            fresh(), num_runs=1, lanczos_steps=settings.steps, seed=seed
        )
        return found.raw_eigenvalues[0].numpy()

    name, kept = "eigenthings", fresh()

    def multiply(seed: int) -> np.ndarray:
        del seed
        return bench.back(kept @ bench.vector)

    return [
        Contender("product", name, multiply, repeats=5),
        Contender("top-5", f"{name}, {steps} steps", top),
        Contender("trace", f"{name}, Hutchinson", total, settings.scale),
        Contender("trace", f"{name}, Hutch++, {settings.budget}", split),
        Contender("density", name, density),
    ]


def curvlinops(bench: Bench) -> list[Contender]:
    """Make the tasks by curvlinops, which leaves eigenvalues to SciPy's ARPACK."""
    package: Any = importlib.import_module("curvlinops")
    chain: Any = importlib.import_module("curvlinops.papyan2020traces.spectrum")
    settings, size = bench.settings, len(bench.vector)

    def fresh(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return package.HessianLinearOperator(
            bench.model,
            nn.CrossEntropyLoss(),
            list(bench.model.parameters()),
            [bench.data],
            check_deterministic=False,
        )

    def top(seed: int) -> np.ndarray:
        start = np.random.default_rng(seed).standard_normal(size, np.float32)
        return arpack.eigsh(fresh().to_scipy(), TOP, which="LA", tol=1e-3, v0=start)[0]

    def total(seed: int) -> np.ndarray:
        found = package.hutchinson_trace(fresh(seed), num_matvecs=settings.probes)
        return np.array([float(found), np.nan])

    def density(seed: int) -> np.ndarray:
        # The chain alone; the bounds its density asks for would cost twice as much.
        return chain.fast_lanczos(fresh(seed), settings.steps)[0].numpy()

    name, kept = "curvlinops", fresh()

    def multiply(seed: int) -> np.ndarray:
        del seed
        return bench.back(kept @ bench.vector)

    return [
        Contender("product", name, multiply, repeats=5),
        Contender("top-5", f"{name} + ARPACK", top),
        Contender("trace", f"{name}, Hutchinson", total, settings.scale),
        Contender("density", f"{name}, not reorth.", density),
    ]


BUILDERS: dict[str, Callable[[Bench], list[Contender]]] = {
    "torch": gradient,
    "pyhessian": pyhessian,
    "hessian_eigenthings": eigenthings,
    "curvlinops": curvlinops,
}


def check(problem: Problem, model: Any, data: tuple[Any, Any]) -> None:
    """Raise RuntimeError if torch computes another loss or gradient."""
    loss, grads = jax.value_and_grad(problem.loss)(problem.params, problem.x, problem.y)
    value = nn.CrossEntropyLoss()(model(data[0]), data[1])
    found = torch.autograd.grad(value, list(model.parameters()))
    value = value.item()
    theirs = torch.cat([g.reshape(-1) for g in found]).numpy()
    ours = np.asarray(ravel_pytree(grads)[0])[order(problem)]
    apart = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    if abs(value / float(loss) - 1) > 1e-5 or apart > 1e-4:
        raise RuntimeError(
            f"torch and JAX disagree on {problem.name}: losses {value} and "
            f"{float(loss)}, gradients {apart:.1e} apart"
        )


def contenders(
    problem: Problem,
    direction: np.ndarray,
    modules: Collection[str],
    settings: Settings,
    threads: int,
) -> tuple[list[Contender], list[str]]:
    """Make the tasks of all packages that can be imported.

    Args:
      problem: network and data.
      direction: what to multiply, flat and in the order of JAX.
      modules: what to use, of the keys of `BUILDERS`.
      settings: how much of each task to do.
      threads: of torch.

    Returns:
      The contenders, and a line per package that fails.
    """
    torch.set_num_threads(threads)
    model, places = network(problem), order(problem)
    labels = torch.from_numpy(np.array(problem.y)).long()
    data = torch.from_numpy(np.array(problem.x)), labels
    check(problem, model, data)

    def back(found: Any) -> np.ndarray:
        flat = np.empty(len(places))
        flat[places] = found.detach().numpy()
        return flat

    vector = torch.from_numpy(direction[places].astype(np.float32))
    bench = Bench(problem.name, model, data, vector, back, settings)
    made, failures = [], []
    for module, build in BUILDERS.items():
        if module in modules:
            try:
                made += build(bench)
            except (ImportError, AttributeError) as error:
                failures.append(f"{module} cannot be used: {error}")
    return made, failures
