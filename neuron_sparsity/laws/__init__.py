"""How activation ratio depends on training data, width-depth ratio and scale: the laws of arXiv:2411.02335, fitted.

With D in billions of training tokens, ReLU models follow `A(D) = exp(-c D^alpha + b) + A_0` and SiLU models
`A(D) = -c / D^alpha + A_0`. The coefficients trade off against each other, so that a best fit says little by itself.
How `fit_law` finds the best one and tells how far each can go:

1. **Shape and size.** A law is `A_0 + B h(D)`. Its shape h depends on alpha and, for ReLU, on K, the e-folds that the
   exponential decays by over the data (`shapes`); c and b follow from K, alpha and B.
2. **Variable projection.** For a given shape, A_0 and B are solved exactly, within 0 <= A_0 <= 1 and B >= 0 (`linear`):
   what is left to search is a plane at most.
3. **Optimum.** The whole plane is laid out on a grid, and its four lowest valleys are followed to the bottom
   (`profile`): a start far from the answer cannot happen.
4. **Region.** With n points and p coefficients, what fits about as well is
   `{sum of squares <= best * (1 + F / (n - p))}`, F the quantile of the F distribution with 1 and n - p degrees of
   freedom. Rows of alpha run from rim to rim of it, in each row K from rim to rim.
5. **Intervals.** In every point of the region the part of the plane (A_0, B) below the cut is an ellipse, cut off by
   the bounds; its extent in any direction is exact. The extremes over the region are the profile intervals of the
   coefficients, of the curve at any D (`LawFit.predict`) and of the tokens needed to come close to the limit. An end
   that is a bound, or infinite, is named.
6. **Noise.** The correlation of neighbouring residuals is estimated (`noise`); where it is strong, a warning says that
   the intervals are too narrow, and `noise="ar1"` makes both fit and intervals allow for it.
7. **Rivals.** Logarithm, sigmoid, power law and exponential are fitted too, once to all points and once to the first
   60 % of the tokens, to be scored on the rest (`rivals`). `law="auto"` picks the law that predicts better.

`fit_width_depth`, `fit_scale` (`architecture`) and `fit_joint` (`joint`) use the same pieces. numpy and scipy only.
"""

from __future__ import annotations

from neuron_sparsity.laws.architecture import ScaleFit, WidthDepthFit, fit_scale, fit_width_depth
from neuron_sparsity.laws.fit import fit_law
from neuron_sparsity.laws.joint import JointCurve, JointFit, fit_joint
from neuron_sparsity.laws.points import Points, read_points
from neuron_sparsity.laws.result import Estimate, LawFit, Prediction
from neuron_sparsity.laws.rivals import LawScore

__all__ = [
    "Estimate",
    "JointCurve",
    "JointFit",
    "LawFit",
    "LawScore",
    "Points",
    "Prediction",
    "ScaleFit",
    "WidthDepthFit",
    "fit_joint",
    "fit_law",
    "fit_scale",
    "fit_width_depth",
    "read_points",
]
