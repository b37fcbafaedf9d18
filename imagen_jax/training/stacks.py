"""Small arrays of one shape, updated as one.

A large network has hundreds of biases and norms. One by one their updates are a large
part of a step's operations: of what a compiler works on, and of what a chip starts.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Elements up to which stacking costs little beside starting another operation.
_SMALL = 8192


def in_stacks(update: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """`update`, with all small arrays of a shape done at once.

    Args:
      update: takes and returns trees in which, at any depth, stand trees of the
        structure of `params`. What it makes of one of their arrays must depend on the
        same array of the others only; what else it returns, on none.
      params: gives structure, shapes and types.

    Returns:
      A function that takes and returns the same trees. Numbers are those of `update`,
      but for the order in which an array's elements are summed.
    """
    leaves, structure = jax.tree.flatten(params)
    alone, stacks = _by_shape(leaves)
    alone_structure = jax.tree.structure(alone)

    def of_params(tree):
        return jax.tree.structure(tree) == structure

    def of_alone(tree):
        return jax.tree.structure(tree) == alone_structure

    def each(trees, is_slot, inside, outside=lambda x: x):
        return jax.tree.map(
            lambda x: inside(x) if is_slot(x) else outside(x), trees, is_leaf=is_slot
        )

    def taken(trees, numbers, together):
        def inside(tree):
            arrays = jax.tree.leaves(tree)
            return together([arrays[number] for number in numbers])

        return each(trees, of_params, inside)

    def axes(trees, is_slot):
        return each(trees, is_slot, lambda _: 0, lambda _: None)

    def merged(single, *stacked):
        if not of_alone(single):
            return single
        found = dict(zip(alone, single, strict=True))
        for numbers, arrays in zip(stacks, stacked, strict=True):
            found.update(zip(numbers, arrays, strict=True))
        return jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])

    def run(*trees):
        single = update(*taken(trees, alone, list))
        ins, outs = axes(trees, of_params), axes(single, of_alone)
        by_rows = jax.vmap(update, in_axes=ins, out_axes=outs)
        stacked = [by_rows(*taken(trees, numbers, jnp.stack)) for numbers in stacks]
        return jax.tree.map(merged, single, *stacked, is_leaf=of_alone)

    return run


def norm(tree: Any) -> jax.Array:
    """`optax.tree.norm(tree)`, with all small arrays of a shape squared at once."""
    leaves = jax.tree.leaves(tree)
    alone, stacks = _by_shape(leaves)
    stacked = [jnp.stack([leaves[i] for i in numbers]) for numbers in stacks]
    return optax.tree.norm([leaves[i] for i in alone] + stacked)


def _by_shape(leaves: list[jax.Array]) -> tuple[list[int], list[list[int]]]:
    """The numbers of the large arrays, and those of the small ones of each shape."""
    alone, shapes = [], collections.defaultdict(list)
    for number, leaf in enumerate(leaves):
        like = shapes[leaf.shape, leaf.dtype] if leaf.size <= _SMALL else alone
        like.append(number)
    return alone, list(shapes.values())
