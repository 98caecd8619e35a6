"""Turns a Flax module into pure functions of plain nested dicts of arrays.

Modules are written with Flax NNX; everything around them (jit, grad, optax, orbax, converters)
sees `{"block": {"kernel": array, ...}}`. Dispatching a jitted function takes a third of the time
with a plain dict that it takes with `nnx.State`, and every tool reads a dict.

    model = functional(lambda rngs: nnx.Linear(3, 4, rngs=rngs))
    params = jax.jit(model.init)(jax.random.key(0))  # {"bias": [4], "kernel": [3, 4]}
    outputs = model.apply(params, inputs)

A module may also hold state that no gradient trains: BatchNorm's running statistics, a codebook
that follows a moving average. It is a second dict, which `apply` reads and `apply_and_update`
returns as the module leaves it:

    variables = model.init_variables(jax.random.key(0))  # {"norm": {"mean": [4], "var": [4]}}
    outputs, variables = model.apply_and_update(params, variables, inputs, train=True)
    outputs = model.apply(params, inputs, variables=variables, train=False)
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from beit_jax.types import Params, PyTree, Variables

_NOT_TRAINED = nnx.Not(nnx.Param)


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module's pure functions. Hashable, so a jitted function may take one as static argument.

    Attributes:
      build: makes the module, drawing its parameters from the given `nnx.Rngs`.
      graphdef: the module without its arrays.
      structure: the parameters' tree structure, which `apply` demands.
      variables_structure: the tree structure of the state that no gradient trains.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: nnx.GraphDef
    structure: jax.tree_util.PyTreeDef
    variables_structure: jax.tree_util.PyTreeDef

    @property
    def has_variables(self) -> bool:
        """Whether the module holds state that no gradient trains."""
        return self.variables_structure.num_leaves > 0

    def init(self, key: jax.Array) -> Params:
        """Draws new parameters.

        Args:
          key: a typed key (`jax.random.key`).

        Returns:
          A plain nested dict of arrays. Works under `jax.jit` and `jax.eval_shape`.
        """
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key)), nnx.Param))

    def init_variables(self, key: jax.Array) -> Variables:
        """Draws the initial state that no gradient trains.

        Args:
          key: a typed key. With the key given to `init`, this is the state of the same module.

        Returns:
          A plain nested dict of arrays; {} where `has_variables` is false.
        """
        if not self.has_variables:
            return {}
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key)), _NOT_TRAINED))

    def shapes(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`s; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def variables_shapes(self) -> Variables:
        """The variables as `jax.ShapeDtypeStruct`s; nothing is computed."""
        return jax.eval_shape(self.init_variables, jax.random.key(0))

    def apply(
        self,
        params: Params,
        *args: PyTree,
        variables: Variables | None = None,
        method: str | None = None,
        **kwargs: PyTree,
    ) -> PyTree:
        """Calls the module with `params`.

        Args:
          params: as `init` gives them.
          *args: for the module's method.
          variables: as `init_variables` gives them; may be left out where the module has none.
            Updates that the method makes to them are dropped.
          method: its name; None means `__call__`.
          **kwargs: for the module's method.

        Returns:
          What the method returns.

        Raises:
          ValueError: parameters or variables are missing or unexpected. Only their names are
            compared.
        """
        module = self._module(params, {} if variables is None else variables)
        function = module if method is None else getattr(module, method)
        return function(*args, **kwargs)

    def apply_and_update(
        self,
        params: Params,
        variables: Variables,
        *args: PyTree,
        method: str | None = None,
        **kwargs: PyTree,
    ) -> tuple[PyTree, Variables]:
        """Calls the module and also returns its variables as the method left them.

        Args:
          params: as `init` gives them.
          variables: as `init_variables` gives them.
          *args: for the module's method.
          method: its name; None means `__call__`.
          **kwargs: for the module's method.

        Returns:
          What the method returns, and the new variables.

        Raises:
          ValueError: as for `apply`.
        """
        module = self._module(params, variables)
        function = module if method is None else getattr(module, method)
        result = function(*args, **kwargs)
        if not self.has_variables:
            return result, {}
        return result, nnx.to_pure_dict(nnx.state(module, _NOT_TRAINED))

    def _module(self, params: Params, variables: Variables) -> PyTree:
        # `nnx.merge` counts leaves and takes them in order: a renamed key would pass there.
        if jax.tree.structure(params) != self.structure:
            raise ValueError(_misfit("parameters", expected=self.shapes(), given=params))
        if not self.has_variables and not variables:
            return nnx.merge(self.graphdef, params)
        if jax.tree.structure(variables) != self.variables_structure:
            raise ValueError(
                _misfit("variables", expected=self.variables_shapes(), given=variables)
            )
        return nnx.merge(self.graphdef, params, variables)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Turns a module's constructor into pure functions, without computing any parameter.

    Args:
      build: called with an `nnx.Rngs` whose every stream comes from `init`'s key. Randomness of the
        forward pass is an argument of the module's methods, never part of the module.

    Returns:
      The functions.

    Raises:
      TypeError: the module holds random state.
    """
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graphdef = nnx.graphdef(module)
    params, variables = nnx.state(module, nnx.Param), nnx.state(module, _NOT_TRAINED)
    for path, variable in nnx.to_flat_state(variables):
        if isinstance(variable, nnx.RngState):
            name = "/".join(str(part) for part in path)
            raise TypeError(
                f"{name} is a {type(variable).__name__}; modules hold no random state, their"
                " methods take a key"
            )
    return Functional(
        build=build,
        graphdef=graphdef,
        structure=jax.tree.structure(nnx.to_pure_dict(params)),
        variables_structure=jax.tree.structure(nnx.to_pure_dict(variables)),
    )


def parameter_names(params: Params) -> set[str]:
    """The paths of a nested dict's leaves, joined by "/"."""
    return set(flatten(params))


def flatten(params: Params) -> dict[str, PyTree]:
    """Nested dict -> one flat dict from "a/b/c" to leaf, in the tree's (sorted) order."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, PyTree]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def _misfit(what: str, *, expected: PyTree, given: PyTree) -> str:
    """One line that names what is missing and what is unexpected."""
    wanted, found = parameter_names(expected), parameter_names(given)
    return (
        f"{what} do not fit the module; "
        f"missing: {', '.join(sorted(wanted - found)) or 'none'}; "
        f"unexpected: {', '.join(sorted(found - wanted)) or 'none'}"
    )
