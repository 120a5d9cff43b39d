"""Training a small language model on several sources, by ways to use micro-batches.

All ways see the same windows of text in the same steps, and start from the same
weights.  The learning rate stays constant after the warm-up: with a decaying one, two
runs would be at different rates where their training losses are equal.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from basinax.benchmarks import _multi_source
from basinax.benchmarks._bytes import VOCABULARY, windows
from basinax.benchmarks._models import Transformer, functional
from basinax.benchmarks._multi_source import MultiSource
from basinax.benchmarks._optimizers import WEIGHT_DECAY, warmup_steps
from basinax.benchmarks._tasks import Batch, Params, classification, matrices
from basinax.landscape import gradient_cosines, gradient_variance
from basinax.optimizers import nexus_value_and_grad

NEIGHBOURS = 8  # looks that a line over the training loss is laid through


class Setting(NamedTuple):
    """Size of the model, of the batches and of the run."""

    width: int = 64
    depth: int = 2
    length: int = 64
    """Bytes that the model sees."""
    size: int = 4
    """Windows in a micro-batch; there is one micro-batch per source."""
    steps: int = 400
    every: int = 20
    """Steps between looks."""
    rate: float = 3e-3
    """Best for accumulation among this, half and twice of it, on another seed."""
    windows: int = 16
    """Of each source, to look at."""


class Way(NamedTuple):
    """How the micro-batches of a step become a gradient."""

    name: str
    normalize: bool = True
    gamma: float = 0.0
    mixed: bool = False
    """Whether micro-batches hold windows of all sources."""


class Problem(NamedTuple):
    """A model and its data."""

    sources: MultiSource
    setting: Setting
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    text: jax.Array
    train: Batch
    """Fixed training windows; a leading axis of sources."""
    held_out: Batch
    unseen: Batch
    """A leading axis of batches."""


class Look(NamedTuple):
    """A model in numbers, arrays; of a whole run, with a leading axis of looks."""

    train: Any
    """Mean over the sources of the loss on training text."""
    held_out: Any
    """Loss on held-out text of each source, shape (sources,)."""
    unseen: Any
    """Loss on the source not trained on."""
    cosine: Any
    """Mean cosine of the gradients of two sources."""
    norm: Any
    """Root mean square of the norms of the sources' gradients."""
    variance: Any
    """Of the gradients across the sources, summed over the parameters."""


class Course(NamedTuple):
    """A run: where it was looked at, what was seen, and the parameters there."""

    step: np.ndarray
    look: Look
    params: list[Params]


def pairs(rows: Any) -> Batch:
    """Split windows into inputs and the byte that follows each."""
    tokens = jnp.asarray(rows).astype(jnp.int32)
    return tokens[..., :-1], tokens[..., 1:]


def pose(sources: MultiSource, setting: Setting) -> Problem:
    """Build the model and cut the windows that are looked at."""
    model = functional(
        lambda rngs: Transformer(
            VOCABULARY, setting.width, setting.depth, setting.width // 32, rngs=rngs
        )
    )
    cut = partial(windows, number=setting.windows, length=setting.length)
    number = len(sources.names)
    unseen = windows(sources.unseen, 2 * number * setting.windows, setting.length)
    return Problem(
        sources,
        setting,
        jax.jit(model.init),
        classification(model.apply).loss,
        jnp.asarray(sources.text),
        pairs(np.stack([cut(text) for text in sources.train])),
        pairs(np.stack([cut(text) for text in sources.held_out])),
        pairs(unseen.reshape(2 * number, setting.windows, -1)),
    )


class Trainer(NamedTuple):
    """Compiled functions of a problem."""

    start: Callable[[int], Any]
    """Seed to parameters and state of the optimizer."""
    advance: Callable[..., Any]
    look: Callable[[Params], Look]


def make_trainer(problem: Problem) -> Trainer:
    """Compile the steps, once with and once without normalisation."""
    setting, loss = problem.setting, problem.loss
    warmup = warmup_steps(setting.steps)
    schedule = optax.schedules.warmup_constant_schedule(
        setting.rate / warmup, setting.rate, warmup
    )
    tx = optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask=matrices)

    def start(seed: int) -> Any:
        params = problem.init(jax.random.key(seed))
        return params, tx.init(params)

    @partial(jax.jit, static_argnames="normalize")
    def advance(
        carry: Any, text: jax.Array, starts: jax.Array, gamma: Any, normalize: bool
    ) -> Any:
        def on_windows(params: Params, starts: jax.Array) -> jax.Array:
            span = jnp.arange(setting.length + 1)
            return loss(params, pairs(text[starts[:, None] + span[None, :]]))

        gradient_fn = nexus_value_and_grad(
            on_windows, gamma, normalize="global" if normalize else None
        )

        def step(carry: Any, starts: jax.Array) -> tuple[Any, None]:
            params, state = carry
            _, gradient = gradient_fn(params, starts)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, starts)[0]

    @jax.jit
    def look(params: Params) -> Look:
        mean_loss = partial(loss, params)
        values, grads = jax.lax.map(
            lambda batch: jax.value_and_grad(loss)(params, batch), problem.train
        )
        cosines = gradient_cosines(grads)
        return Look(
            train=jnp.mean(values),
            held_out=jax.lax.map(mean_loss, problem.held_out),
            unseen=jnp.mean(jax.lax.map(mean_loss, problem.unseen)),
            cosine=cosines.mean,
            norm=jnp.sqrt(jnp.mean(cosines.norms**2)),
            variance=gradient_variance(grads, unbiased=False).total,
        )

    return Trainer(start, advance, look)


def train(problem: Problem, trainer: Trainer, way: Way, seed: int) -> Course:
    """Train in one way; equal seeds see the same windows in the same steps."""
    setting = problem.setting
    rng = np.random.default_rng(seed)
    starts = _multi_source.pure(
        problem.sources, rng, setting.steps, setting.size, setting.length + 1
    )
    if way.mixed:
        starts = _multi_source.mixed(starts, rng)
    carry = trainer.start(seed)
    steps, looks, params = [], [], []
    for first in range(0, setting.steps, setting.every):
        part = jnp.asarray(starts[first : first + setting.every], jnp.int32)
        gamma = jnp.float32(way.gamma)
        carry = trainer.advance(carry, problem.text, part, gamma, way.normalize)
        steps.append(first + len(part))
        params.append(carry[0])
        looks.append(jax.device_get(trainer.look(carry[0])))
    return Course(
        np.array(steps), Look(*map(np.stack, zip(*looks, strict=True))), params
    )


def nearest(course: Course, level: float) -> int:
    """Find the look whose training loss is nearest to a level."""
    return int(np.argmin(np.abs(course.look.train - level)))


def at_level(course: Course, level: float, looks: int = NEIGHBOURS) -> Look | None:
    """Read a run off at a training loss.

    A single look trembles with the last steps, so a line through some of them, over
    their training loss, is evaluated at the level.

    Args:
      course: the run.
      level: training loss.
      looks: how many of the nearest looks the line goes through.

    Returns:
      All numbers there, or None where the run did not get down to the level, or was
      never above it.
    """
    losses = course.look.train.astype(np.float64)
    if not (losses.min() <= level <= losses.max() and losses.min() < losses.max()):
        return None
    rows = np.argsort(np.abs(losses - level), kind="stable")[:looks]
    away = losses[rows] - level
    centred = away - away.mean()

    def read(values: np.ndarray) -> np.ndarray:
        chosen = values[rows].astype(np.float64)
        slope = np.tensordot(centred, chosen, 1) / np.sum(centred**2)
        return chosen.mean(axis=0) - slope * away.mean()

    return Look(*map(read, course.look))
