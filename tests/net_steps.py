"""A small net, its data and its steps, for tests of what changes around an engine."""

import torch
import torch.nn.functional as F
from graddot_lm import GradDotProdEngine
from torch import nn

X, Y = (
    torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)).double(),
    torch.arange(6) % 3,
)
TRAIN, VAL = (X[:4], Y[:4]), (X[4:], Y[4:])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.head(self.down(self.up(x).tanh()).tanh().mean(1))


def step(engine, loss_of, factor=1.0, number=0, track=True, train=TRAIN, model=None):
    """One step with a loss made of the model's output; its scores."""
    engine.attach_train_batch(*train, number, torch.arange(4))
    x, y = engine.prepare_forward_input(*train)
    loss = loss_of(engine.model if model is None else model, x, y)
    ((engine.track_loss(loss) if track else loss) * factor).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def plain_loss(model, x, y):
    return F.cross_entropy(model(x), y)


def attached(model, optimizer=None, val=VAL, **options):
    engine = GradDotProdEngine(model, val, **options)
    engine.attach(optimizer)
    return engine
