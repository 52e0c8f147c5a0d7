"""Where engines start: prior draws, a module's own initialisation, modes, paths, given values, or another posterior.

- "prior": a draw for each chain.
- "network": the initialisation that a module brings along; other sites from the prior.
- "map": a **deep ensemble**, one member for each chain: each is trained from its own initialisation ("network") by 500
  steps of Adam with a cosine learning rate. For networks: long enough to leave the flat and steep regions where random
  weights lie, and members end in different modes. A hundred transitions of warm-up are then enough (Sommer et al.,
  2024). Adam moves a coordinate by a dozen at most, so it is not for programs with coordinates of any scale, and the
  mode of a hierarchical model may lie where its scale is 0.
- "pathfinder": a draw for each chain from a Gaussian fitted on its way from a prior draw to a mode (pathfinder.py). For
  statistical programs of any scale, hierarchical ones among them, and small networks; it also gives the first metric.
- values of sites, or another posterior: a draw of it goes to each chain, and the mean of a Gaussian to a single one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdl._rng import derive_seed, generator
from bayesdl.errors import MethodError
from bayesdl.infer.loop import Run
from bayesdl.infer.pathfinder import PathfinderEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.problem import Problem

STARTS = ("prior", "network", "map", "pathfinder")


def start(
    problem: Problem,
    run: Run,
    chains: int,
    default: str = "prior",
    batch_size: int | None = None,
) -> Tensor:
    """Starting points in unconstrained coordinates, as ``start_and_scale`` gives them."""
    return start_and_scale(problem, run, chains, default=default, batch_size=batch_size)[0]


def start_and_scale(
    problem: Problem,
    run: Run,
    chains: int,
    default: str = "prior",
    batch_size: int | None = None,
    rows: Mapping[str, Any] | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Starting points, and the scales of the coordinates where the start has learnt them.

    Args:
        problem: the model and its data.
        run: its ``init`` says where to start; chain k's start depends on the seed and k alone.
        chains: how many starts.
        default: the choice when ``run.init`` is None.
        batch_size: rows in a mini-batch of the optimiser behind "map"; None takes all rows.
        rows: batch of its own for every chain, ``[C, B, ...]`` by argument, of chains of several data sets.
        groups: G; chains of a data set stand side by side.

    Returns:
        ``[chains, D]``, and standard deviations ``[G, D]`` or None.

    Raises:
        MethodError: unknown choice, or values that do not fit the model's sites.
    """
    init = default if run.init is None else run.init
    if isinstance(init, GaussianPosterior) and chains == 1:
        return _from_values(problem, problem.density.constrain(init.mean), chains), None
    if isinstance(init, Posterior):
        return _from_values(problem, init.draws(chains, seed=derive_seed(run.seed, "init")), chains), None
    if isinstance(init, Mapping):
        return _from_values(problem, init, chains), None
    if init == "prior":
        return _from_prior(problem, run, chains), None
    if init == "network":
        return _from_network(problem, run, chains), None
    if init == "map":
        if rows is not None:
            raise MethodError(
                "init='map' trains on one data set, and these chains have several: use 'pathfinder' or 'prior'."
            )
        return _from_mode(problem, run, chains, batch_size), None
    if init == "pathfinder":
        return _from_paths(problem, run, chains, rows, groups)
    raise MethodError(f"init={init!r} is unknown: use {', '.join(STARTS)}, a dict of site values, or a posterior.")


def _from_prior(problem: Problem, run: Run, chains: int) -> Tensor:
    return torch.cat([problem.density.prior_draws(1, derive_seed(run.seed, "init", k)) for k in range(chains)])


def _from_paths(
    problem: Problem, run: Run, chains: int, rows: Mapping[str, Any] | None, groups: int
) -> tuple[Tensor, Tensor]:
    stage = run.stage("pathfinder")
    begin = _from_prior(problem, run, chains).to(problem.density.dtype)
    engine = PathfinderEngine(problem.density, begin, stage.seed, rows)
    state = stage.drive(engine, problem.density)
    return engine.result(state), engine.scale(state, groups)


def _from_network(problem: Problem, run: Run, chains: int) -> Tensor:
    """A module's own initialisation; sites that it does not know come from the prior, as in a program without one."""
    base = _from_prior(problem, run, chains)
    initial_values = getattr(problem.model, "initial_values", None)
    if initial_values is None:
        return base
    values = problem.density.constrain(base)
    fresh = [initial_values(generator(run.seed, "network", k)) for k in range(chains)]
    return problem.density.unconstrain(values | {name: torch.stack([f[name] for f in fresh]) for name in fresh[0]})


def _from_mode(problem: Problem, run: Run, chains: int, batch_size: int | None) -> Tensor:
    # optimise.py starts from this module, so it is looked up only when asked for
    from bayesdl.infer.optimise import find_mode

    return find_mode(problem, run.stage("map"), chains, batch_size)


def _from_values(problem: Problem, values: Mapping[str, Tensor], chains: int) -> Tensor:
    """Given values ``[*shape]``, shared by all chains, or ``[chains, *shape]``."""
    full = {name: torch.as_tensor(value).to(problem.density.dtype) for name, value in values.items()}
    for site in problem.density.sites:
        if site.name in full and full[site.name].shape == site.shape:
            full[site.name] = full[site.name].expand(chains, *site.shape)
    z = problem.density.unconstrain(full)
    if z.shape != (chains, problem.density.dim):
        raise MethodError(f"init holds values for {len(z)} chains, but {chains} are to start.")
    if not torch.isfinite(z).all():
        raise MethodError("init holds NaN, or values outside the support of their sites or on its edge.")
    return z
