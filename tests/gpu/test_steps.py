"""Steps with scores on a GPU: nothing waits for it, and the rows are right all the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import sample_dots, tiny_gpt2, token_batch, total
from graddot_lm import GradDotProdEngine, fuse_head, unfuse_head
from graddot_lm.background import BackgroundWriter
from graddot_lm.store import SCORES, PartWriter, read_scores


@pytest.mark.parametrize("given", [False, True], ids=["riding", "given"])
@pytest.mark.parametrize("head", ["untied", "tied", "fused"])
def test_a_step_does_not_wait_and_its_rows_are_right(tmp_path, head, given):
    (tmp_path / "scores").mkdir()
    (tmp_path / "config.json").write_text("{}")
    writer = BackgroundWriter(PartWriter(tmp_path / "scores", SCORES))
    model, val = tiny_gpt2(tied=head != "untied").cuda(), token_batch(2, 15, seed=9)
    if head == "fused":
        fuse_head(model)
    val_on_gpu = tuple(x.cuda() for x in val)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, device="cuda"))
    engine = GradDotProdEngine(model, None if given else val, store=writer)
    if given:
        engine.set_directions(engine.compute_directions([val_on_gpu]))
    engine.attach(optimizer)
    batches = [token_batch(3, 15, seed=number, ragged=True) for number in range(4)]
    on_gpu = [[x.cuda() for x in batch] for batch in batches]
    ids = torch.arange(3, device="cuda")
    for number, batch in enumerate(on_gpu):
        # The first steps check, compile kernels and fetch pinned memory, which may all wait.
        torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
        try:
            engine.attach_train_batch(*batch, number, ids)
            x, y = engine.prepare_forward_input(*batch)
            model(x, labels=y).loss.backward()
            engine.prepare_gradients()
            engine.aggregate_and_log({"loss": torch.full((3,), float(number), device="cuda")})
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    engine.detach()
    writer.flush()
    rows = read_scores(tmp_path).to_pylist()
    if head == "fused":
        unfuse_head(model)
    plain = copy.deepcopy(model).cpu()
    for number, batch in enumerate(batches):
        dots, scales = sample_dots(plain, batch, val)
        got = torch.tensor([row["dot"] for row in rows[3 * number : 3 * number + 3]])
        assert ((got - total(dots)).abs() / total(scales)).max() <= 1e-5
        assert [row["loss"] for row in rows[3 * number : 3 * number + 3]] == [number] * 3


def test_a_step_of_pairs_does_not_wait_and_is_right():
    model = tiny_gpt2().cuda()

    def losses(model, ids):
        each = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        chosen, rejected = each.sum((1, 2)).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected))

    def gradient(model, ids):
        own = torch.autograd.grad(losses(model, ids).mean(), list(model.parameters()))
        return torch.cat([g.flatten() for g in own])

    exact = copy.deepcopy(model).cpu().double()
    (val, _), (ids, _) = token_batch(4, 15, seed=9), token_batch(6, 15, seed=1)
    engine = GradDotProdEngine(model)
    loss = lambda model, ids, labels: losses(model, ids).mean()
    engine.set_directions(engine.compute_directions([(val.cuda(), torch.ones(4).cuda())], loss))
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    on_gpu = ids.cuda()
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
        try:
            engine.attach_train_batch(on_gpu, None, number, None, samples=[0, 1, 2, 0, 1, 2])
            engine.track_loss(losses(model, on_gpu).mean()).backward()
            engine.prepare_gradients()
            scores = engine.aggregate_and_log()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    direction = gradient(exact, val)
    own = [gradient(exact, ids[[i, i + 3]]) for i in range(3)]
    for got, g in zip(scores.tolist(), own, strict=True):
        assert abs(got - float(direction @ g)) <= 1e-5 * float(direction.norm() * g.norm())
