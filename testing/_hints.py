"""How the common causes of a failed check are repaired."""

import re

# Tried in this order on what a check says; the first that matches is shown.
CAUSES = (
    (
        r"\(weak\)|Python (float|int|bool)",
        "A Python number in the state is weakly typed, and strongly typed after a "
        "step. Create it with its dtype: jnp.zeros([], jnp.float32), "
        "jnp.asarray(x, jnp.float32).",
    ),
    (
        r"TracerBoolConversionError",
        "Python's `if`, `and`, `max` or `assert` met a traced value. Use jnp.where or "
        "jax.lax.cond; test an argument's range only if it is a concrete number.",
    ),
    (
        r"ConcretizationTypeError|TracerIntegerConversionError|TracerArrayConversion",
        "Python or NumPy asked for the value of a traced array. Use jnp, or make the "
        "argument static.",
    ),
    (
        r"'function' and |and 'function'|: 'function'",
        "A schedule reached the arithmetic: evaluate it at the count, or pass "
        "schedules=() if numbers are all that is taken.",
    ),
    (
        r"same buffer",
        "`init` stores a parameter itself. Store a copy, "
        "jax.tree.map(lambda p: jnp.array(p, copy=True), params), and make every "
        "zero tree by a call of its own.",
    ),
    (
        r"NoneType",
        "None reached an array operation. jax.tree.map skips None by itself: avoid "
        "`is_leaf=lambda x: x is None`, loops over leaves, and functions of "
        "leaves that return None.",
    ),
    (
        r"float16 leaves: NaN",
        "float16 ends at 65504 and has nothing between 6e-8 and zero. Compute norms "
        "and second moments in float32, and choose an eps that float16 has.",
    ),
    (
        r"zero size",
        "orbax refuses arrays without elements. Where there is nothing to keep, put "
        "None or optax.MaskedNode() into the state.",
    ),
    (
        r"ShardingTypeError",
        "On an Explicit mesh, reshapes and matrix products of sharded axes need to be "
        "told the layout of their result. Pass `out_sharding`, move the axes by "
        "jax.sharding.reshard, or wrap the kernel in jax.sharding.auto_axes.",
    ),
    (
        r"unexpected keyword argument 'for_another_link'",
        "End the signature of `update` in `**extra_args`, and pass them on where you "
        "call another transformation's update.",
    ),
    (
        r"missing \d+ required (keyword-only )?argument",
        "`update` needs more than gradients, state and params. Hand it over by "
        "`extra_args`, for instance extra_args=lambda loss_fn: {'value_fn': loss_fn}.",
    ),
)

HINTS = {
    "params_optional_or_asked_for": "Let `update` begin with: if params is None: "
    "raise ValueError('this transformation needs params').",
    "is_pure": "Something outside the state counts or remembers: a closure, an "
    "iterator, NumPy's random numbers. Keep it in the state.",
    "state_is_strongly_typed": "Create every state leaf by jnp with a dtype.",
    "state_is_stable": "A step changes the type of the state, so the next step is "
    "compiled again. Cast what is stored to the dtype it had.",
    "keeps_dtype": "A float32 array (a hyperparameter, a step size, a statistic) "
    "promotes half-precision updates. Compute in float32 if need be and return "
    "u.astype(g.dtype).",
    "float64": "A cast to float32 drops half of the digits. Widen with "
    "jnp.promote_types(x.dtype, jnp.float32) instead.",
    "containers": "`is_leaf` or jax.tree.transpose takes the user's tuples for "
    "your own. Map once per result, or mark your results by a class of their own.",
    "none_leaves": "None stands for a leaf that is absent; jax.tree.map keeps it.",
    "empty_tree": "Do not index jax.tree.leaves(...) or reduce without an initial "
    "value; optax.partition hands over empty trees.",
    "bare_leaf": "The parameters may be a single array; go through jax.tree.map.",
    "small_and_empty_leaves": "Guard the divisor of means, norms and spreads, "
    "which are zero or undefined on leaves of one element or none.",
    "stacked_leaves": "Take norms and products over the last two axes only, or pass "
    "stacked=False if a leaf with three axes is meant as one.",
    "zero_gradients": "A division by zero: guard the divisor itself, "
    "x / jnp.where(norm > 0, norm, 1), not the result.",
    "nan_surfaces": "If swallowing NaN is intended, skip=['nan_surfaces'].",
    "converges_on_parabola": "Wrong sign, or `learning_rate` out of range: pass the "
    "rate that suits it; is_optimizer=False if optax.sgd is to follow it; "
    "reaches_every_point=False if it is not meant to get there.",
    "jit_matches_eager": "Something depends on being traced: a Python side effect, "
    "or a branch on concrete values.",
    "no_host_callbacks": "Remove debug prints and pure_callback from `update`; "
    "return what you want to see in the state.",
    "compiles_once": "A state leaf changes its type, shape or layout in a step.",
    "state_survives_control_flow": "State types must not change in a step.",
    "vmap": "Reduce over a leaf's own axes only; no host callbacks.",
    "donation": "Each state leaf needs a buffer of its own.",
    "abstract_init": "`init` reads values. It may read shapes and dtypes only.",
    "map_params": "Make the state by jax.tree.map over params, and never read "
    "jax.tree.leaves(params)[0] in `init`: map_params calls it with a placeholder.",
    "inject_hyperparams": "The arguments arrive as traced float32 scalars. List those "
    "that must stay Python values in static_args.",
    "schedules": "Evaluate the schedule at a count that starts at zero; "
    "optax.scale_by_learning_rate does. Pass schedules=() if there are none.",
    "multi_steps": "While gradients accumulate, the update of what is there so far is "
    "computed and multiplied by zero, which keeps a NaN.",
    "masked": "Masked leaves arrive as optax.MaskedNode, which has no leaves; "
    "count and reduce over jax.tree.leaves.",
    "checkpoint_round_trip": "Two state leaves may have the same name once their "
    "path is joined by dots, or a leaf is no array.",
    "auto_mesh": "Make state by jnp.zeros_like(param), which keeps its layout; "
    "jnp.zeros(param.shape) lies on one device.",
    "explicit_mesh": "Make state by jnp.zeros_like(param), and keep the layout of a "
    "leaf in its update.",
}
HINTS |= {
    "converges_on_mixed_target": HINTS["converges_on_parabola"],
    "constant_schedules": HINTS["schedules"],
    "partition": HINTS["masked"],
}


def hint(check: str, detail: str) -> str:
    """Return advice on a failed check, or an empty string."""
    found = (text for cause, text in CAUSES if re.search(cause, detail))
    return next(found, HINTS.get(check, ""))
