"""The arithmetic of a network: its convolutions and products."""

import math

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from imagen_jax.config import StageConfig
from imagen_jax.models import network


def forward_flops(cfg: StageConfig) -> int:
    """Floating-point operations of one training picture or crop through the network.

    Convolutions and products only, two for a multiplication with its addition, padding
    included. A training step is taken to cost three times as much, as everywhere.
    """
    trace = jax.make_jaxpr(network.apply, static_argnums=0)
    return count(trace(cfg.model, *network.abstract_inputs(cfg)).jaxpr)


def count(jaxpr: Jaxpr) -> int:
    """Floating-point operations of a traced function's convolutions and products."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            products = math.prod(shape[axis] for axis in contracted)
            total += 2 * products * equation.outvars[0].aval.size
        elif equation.primitive.name == "conv_general_dilated":
            # Kernel elements of one output channel are what one output sums over.
            kernel = equation.invars[1].aval
            layout = equation.params["dimension_numbers"].rhs_spec
            products = kernel.size // kernel.shape[layout[0]]
            total += 2 * products * equation.outvars[0].aval.size
        times = equation.params.get("length", 1)
        inner = jaxprs_in_params(equation.params)
        total += times * sum(count(each) for each in inner)
    return total
