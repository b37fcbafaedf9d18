"""Floating-point operations of a traced function, on any platform."""

import math

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from imagen_jax.config import StageConfig
from imagen_jax.models import network


def forward_flops(cfg: StageConfig) -> int:
    """FLOPs of one training image or crop through the network, once."""
    trace = jax.make_jaxpr(network.apply, static_argnums=0)
    return count_flops(trace(cfg.model, *network.abstract_inputs(cfg)).jaxpr)


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of a traced function's matrix products and convolutions, on all devices.

    A multiplication and its addition are two, what a convolution pads with is nothing.
    A loop counts by its length (`while`, of unknown length, once), a kernel by its
    grid, and a conditional by its costliest branch.
    """
    return sum(_count(equation) for equation in jaxpr.eqns)


def _count(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return (
            2 * math.prod(shape[i] for i in contracted) * equation.outvars[0].aval.size
        )
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [count_flops(each) for each in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if name == "shard_map":
        return params["mesh"].size * sum(inner)
    return params.get("length", 1) * sum(inner)


def _convolution(equation: JaxprEqn) -> int:
    image, kernel = (each.aval.shape for each in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    axes = params["dimension_numbers"]
    flops = 2 * out[axes.out_spec[0]] * out[axes.out_spec[1]] * kernel[axes.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        size = image[axes.lhs_spec[i + 2]]
        places = np.arange(out[axes.out_spec[i + 2]])[:, None]
        taps = np.arange(kernel[axes.rhs_spec[i + 2]]) * params["rhs_dilation"][i]
        met = places * params["window_strides"][i] + taps - low
        spread = params["lhs_dilation"][i]
        inside = (met >= 0) & (met <= (size - 1) * spread) & (met % spread == 0)
        flops *= int(inside.sum())
    return flops
