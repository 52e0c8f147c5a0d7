"""Every private piece of Pyro that the density relies on, so that a new Pyro breaks here and loudly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.mcmc.util import TraceTreeEvaluator
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.subsample_messenger import _Subsample


def test_a_plate_shows_up_as_a_subsample_site() -> None:
    def model() -> None:
        with pyro.plate("data", 10, subsample_size=4):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(4))

    trace = poutine.trace(model).get_trace()
    plate = trace.nodes["data"]
    assert isinstance(plate["fn"], _Subsample)
    assert (plate["fn"].size, plate["fn"].subsample_size) == (10, 4)
    site = trace.nodes["y"]
    (frame,) = site["cond_indep_stack"]
    assert CondIndepStackFrame._fields == ("name", "dim", "size", "counter", "full_size")
    assert (frame.name, frame.dim, frame.size, frame.full_size, frame.vectorized) == ("data", -1, 4, 10, True)
    assert site["scale"] == 2.5
    assert site["mask"] is None


def test_deterministic_sites_are_marked() -> None:
    trace = poutine.trace(lambda: pyro.deterministic("d", torch.ones(()))).get_trace()
    assert trace.nodes["d"]["infer"]["_deterministic"] is True


def test_markov_context_is_marked() -> None:
    def model() -> None:
        for t in pyro.markov(range(2)):
            pyro.sample(f"k{t}", dist.Bernoulli(0.5))

    assert poutine.trace(model).get_trace().nodes["k1"]["infer"]["_markov_depth"] == 1


def test_message_can_be_answered_by_a_messenger() -> None:
    class Answer(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: dict[str, object]) -> None:
            msg["value"], msg["done"] = torch.tensor(7.0), True

    with Answer():
        assert pyro.sample("x", dist.Normal(0.0, 1.0)) == 7.0


def test_helpers_have_the_signatures_that_are_called() -> None:
    assert scale_and_mask(torch.ones(3), 2.0, torch.tensor([True, False, True])).tolist() == [2.0, 0.0, 2.0]
    trace = poutine.trace(poutine.enum(_switch, first_available_dim=-1)).get_trace()
    evaluator = TraceTreeEvaluator(trace, has_enumerable_sites=True, max_plate_nesting=0)
    torch.testing.assert_close(evaluator.log_prob(trace), torch.tensor(0.0))


def _switch() -> None:
    pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
