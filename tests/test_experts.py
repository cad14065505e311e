"""Experts that are one module, as transformers 5 has them, and the proof of their rule."""

import pytest
from brute_force import sample_dots, token_batch, total
from engine_steps import relative, run_step
from graddot_lm import GraddotError
from graddot_lm.checks import copies, layer_proof
from model_zoo import VOCAB, moe, needs_mixtures
from test_models import TOLERANCE


def mixture():
    needs_mixtures()
    return moe("Mixtral", num_local_experts=8)


def experts_of(model):
    return [part for name, part in model.named_modules() if name.endswith("mlp.experts")]


def test_experts_in_one_module_are_proven_on_a_few(monkeypatch, record_property):
    """A proof holds float64 copies of a layer, of which experts are nearly all of a model."""
    copied = []

    def exact_copy(module):
        if any(type(module) is type(part) for part in experts_of(model)):
            copied.append(module.down_proj.shape[0])
        return copies.exact_copy(module)

    monkeypatch.setattr(layer_proof, "exact_copy", exact_copy)
    model = mixture()
    train, val = token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2)
    dots, _ = sample_dots(model, train, val)
    scores, _ = run_step(model, train, val)
    assert copied == [3, 3] * 2  # two copies of each of two layers
    error = relative(scores, total(dots))
    record_property("relative_error", error)
    assert error <= TOLERANCE
    assert all(part.down_proj.shape[0] == part.num_experts == 8 for part in experts_of(model))


def of_class(model, forward):
    """With another forward in the class of its experts."""
    for part in experts_of(model):
        part.__class__ = type("Other", (type(part),), {"forward": forward(type(part).forward)})
    return model


def test_experts_that_do_something_else_are_refused():
    twice = lambda forward: lambda self, *args: 2 * forward(self, *args)
    model = of_class(mixture(), twice)
    with pytest.raises(GraddotError, match="mlp.experts of type Other has no rule that holds"):
        run_step(model, token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2))


def test_experts_that_cannot_be_made_fewer_are_proven_as_they_are(close):
    def of_eight(forward):
        def call(self, *args):
            assert self.num_experts == len(self.down_proj) == 8
            return forward(self, *args)

        return call

    model = of_class(mixture(), of_eight).double()
    train, val = token_batch(4, 11, VOCAB, seed=1), token_batch(2, 11, VOCAB, seed=2)
    dots, scales = sample_dots(model, train, val)
    close(run_step(model, train, val)[0], total(dots), TOLERANCE, total(scales))
