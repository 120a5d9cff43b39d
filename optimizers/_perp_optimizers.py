"""⊥SGD and ⊥AdamW: optax's optimizers on projected gradients.

The gradient is projected first and handed to the base optimizer, as in the code of
Prieto et al., "Grokking at the Edge of Numerical Stability" (arXiv:2501.04697).
"""

from typing import Any

import optax

from basinax.optimizers._options import takes_options_of
from basinax.optimizers._perp_grad import perp_grad


@takes_options_of(perp_grad)
def perp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Any = 0.8,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Descend along projected gradients; see `perp_grad`.

    Without momentum and decay the squared norm of a weight grows by η²‖g‖² in each step
    and by nothing else.

    Args:
        learning_rate: η, a number or a schedule.
        momentum: decay of the velocity, or None; 0.8 as in the authors' runs.
        nesterov: whether to look ahead.
        weight_decay: L2 coefficient, added after the projection and before momentum.
        weight_decay_mask: tree of bools, or a callable of params, of leaves to decay.
        **options: keyword arguments of `perp_grad`, among them `mask` for the leaves
            to project.

    Returns:
        `optax.chain(perp_grad, add_decayed_weights, sgd)`.

    Raises:
        ValueError: as `perp_grad`.

    Example:
        >>> from basinax.optimizers import perp_sgd
        >>> tx = perp_sgd(0.1, momentum=None)

    Reference:
        arXiv:2501.04697, ⊥SGD.
    """
    return optax.chain(
        perp_grad(**options),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.sgd(learning_rate, momentum, nesterov),
    )


@takes_options_of(perp_grad)
def perp_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    mu_dtype: Any = None,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Run AdamW on projected gradients; see `perp_grad`.

    Adam divides elementwise, so its step is not orthogonal to the weights and these
    still grow; decoupled weight decay works against that and goes well with it.

    Args:
        learning_rate: η, a number or a schedule; the authors use 1e-2 to 1e-3.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment. With float16 parameters it must be
            at least 1e-7, the least that float16 holds, or zero gradients give NaN.
        mu_dtype: dtype of the first moment; default that of the parameters.
        weight_decay: λ, decoupled; 0 as in the authors' runs.
        weight_decay_mask: tree of bools, or a callable of params, of leaves to decay.
        **options: keyword arguments of `perp_grad`, among them `mask` for the leaves
            to project.

    Returns:
        `optax.chain(perp_grad, adamw)`.

    Raises:
        ValueError: as `perp_grad`.

    Example:
        >>> from basinax.optimizers import perp_adamw
        >>> tx = perp_adamw(1e-2)

    Reference:
        arXiv:2501.04697, ⊥AdamW.
    """
    return optax.chain(
        perp_grad(**options),
        optax.adamw(
            learning_rate,
            b1,
            b2,
            eps,
            mu_dtype=mu_dtype,
            weight_decay=weight_decay,
            mask=weight_decay_mask,
        ),
    )
