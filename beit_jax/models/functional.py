"""The one place where a module becomes pure functions of plain nested dicts of arrays.

Modules are written with Flax NNX; everything around them (jit, grad, optax, orbax, converters)
sees `{"block": {"kernel": array, ...}}`. A plain dict costs jit a third of the dispatch time of
`nnx.State`, and every tool reads it.

    model = functional(lambda rngs: nnx.Linear(3, 4, rngs=rngs))
    params = jax.jit(model.init)(jax.random.key(0))  # {"bias": [4], "kernel": [3, 4]}
    outputs = model.apply(params, inputs)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]  # nested: str -> Params or array


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module's pure functions. Hashable, so a jitted function may take one as static argument.

    Attributes:
      build: makes the module, drawing its parameters from the given `nnx.Rngs`.
      graphdef: the module without its parameters.
      structure: the parameters' tree structure, which `apply` demands.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: nnx.GraphDef
    structure: jax.tree_util.PyTreeDef

    def init(self, key: jax.Array) -> Params:
        """Draws new parameters.

        Args:
          key: a typed key (`jax.random.key`).

        Returns:
          A plain nested dict of arrays. Works under `jax.jit` and `jax.eval_shape`.
        """
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key))))

    def shapes(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`s; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params: Params, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
        """Calls the module with `params`.

        Args:
          params: as `init` gives them.
          *args: for the module's method.
          method: its name; None means `__call__`.
          **kwargs: for the module's method.

        Returns:
          What the method returns.

        Raises:
          ValueError: parameters are missing or unexpected. Only their names are compared.
        """
        # `nnx.merge` counts leaves and takes them in order: a renamed key would pass there.
        if jax.tree.structure(params) != self.structure:
            expected, given = parameter_names(self.shapes()), parameter_names(params)
            raise ValueError(
                "parameters do not fit the module; "
                f"missing: {', '.join(sorted(expected - given)) or 'none'}; "
                f"unexpected: {', '.join(sorted(given - expected)) or 'none'}"
            )
        module = nnx.merge(self.graphdef, params)
        function = module if method is None else getattr(module, method)
        return function(*args, **kwargs)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Turns a module's constructor into pure functions, without computing any parameter.

    Args:
      build: called with an `nnx.Rngs` whose every stream comes from `init`'s key. Randomness of the
        forward pass is an argument of the module's methods, never part of the module.

    Returns:
      The functions.

    Raises:
      TypeError: the module holds variables other than `nnx.Param`, random state for instance.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.Param):
            name = "/".join(str(part) for part in path)
            raise TypeError(f"{name} is a {type(variable).__name__}; modules hold only nnx.Param")
    structure = jax.tree.structure(nnx.to_pure_dict(state))
    return Functional(build=build, graphdef=graphdef, structure=structure)


def parameter_names(params: Params) -> set[str]:
    """The paths of a nested dict's leaves, joined by "/"."""
    return set(flatten(params))


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> one flat dict from "a/b/c" to leaf, in the tree's (sorted) order."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params
