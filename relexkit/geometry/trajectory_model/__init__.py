"""A run as a Gaussian process, fitted to its Gram matrix: how much of it is drift, how long the
drift lasts, where it goes.

Every parameter's gradient is taken to be ``d + e``. The drift ``d`` either keeps its direction for
a correlation time ``ell`` (covariance ``tau^2 exp(-|i - j| / ell)``; infinite for a true line), or
dies out (``tau^2 exp(-(i + j) / kappa)``, a line of a run that saturates). The noise ``e`` has a
short memory ``phi`` (covariance ``phi^|i - j|``; 0 is white). The optimizer turns gradients into
updates by its momentum with Adam's bias correction and the learning rate, which is a known linear
map ``H`` from gradients to recorded deltas, and storage adds rounding. So the deltas of one
parameter have the covariance

    K = sigma^2 (H R_phi H^T + tau^2 H R_d H^T + nu^2 I)
    log p = -D/2 log|K| - 1/2 tr(K^-1 G)

The best linear predictor under the model is a vector of weights over the observed deltas, ``a(t) =
K^-1 k(t)``, with variance ``k(t, t) - k(t)^T K^-1 k(t)`` per parameter.

Of a stretch inside a run, whose optimizer was warm, the momentum may be given instead, as earlier
steps tell it. Then what it held at the start is fitted, ``gamma^2 h h^T`` with ``h`` how far it
carries, so a drift that ended there is no evidence of one.

The bias correction matters: without it, a fresh optimizer's first updates, which are several times
larger than the later ones, look like a drift that dies out. Parameters are not independent, so the
likelihood counts ``effective_dimension`` of them, measured from the scatter of the whitened Gram
matrix about the identity; strength and kind of the drift are then averaged over their posterior
rather than maximised, with a prior by which a drift that has lasted ``s`` steps lasts about as many
again. One fit serves every tensor of a scope, up to a scale that does not affect the weights.

Inside, each module uses those before it: ``response``, how gradients become deltas; ``likelihood``,
the search for momentum and rounding; ``posterior``, what is averaged over; ``fit``, the fitted
model and its predictions.
"""

from relexkit.geometry.trajectory_model.fit import (
    SPACED,
    TrajectoryFit,
    fit_trajectory,
    fit_whole,
)

__all__ = ["SPACED", "TrajectoryFit", "fit_trajectory", "fit_whole"]
