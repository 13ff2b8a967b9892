"What a training step did, and the same in float64, row by row."
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, tensor

from fastai_mixup_ext import MixUpCallback


class Tape(Callback):
    "Record each training batch: `x`, `y` as loaded, `xb`, `yb` as model and loss get them, the mix, the prediction and the loss"
    order,run_valid = -5,False  # just before the callback under test
    def __init__(self): self.steps = []
    def before_batch(self): self.steps.append(SimpleNamespace(x=self.xb, y=self.yb, was=copied((self.xb, self.yb)), loss=None))
    def after_pred(self): vars(self.steps[-1]).update(mix=self.mixer.mix, xb=self.xb, yb=self.yb)
    def after_loss(self): self.steps[-1].pred = detached(self.pred)
    def before_backward(self): self.steps[-1].loss = self.learn.loss.detach()
    @property
    def mixer(self): return next(o for o in self.learn.cbs if hasattr(o, 'recipe'))

def detached(o): return o.detach() if isinstance(o, torch.Tensor) else type(o)(map(detached, o))

def copied(o):
    if isinstance(o, dict): o = tuple(o.values())
    return o.clone() if isinstance(o, torch.Tensor) else tuple(map(copied, o)) if isinstance(o, (tuple, list)) else o

def loaders(items, bs=8, n_inp=None, **kwargs):
    "The same `items` to train and to validate"
    dls = DataLoaders.from_dsets(items, items, bs=bs, num_workers=0, device='cpu', **kwargs)
    if n_inp is not None: dls.n_inp = n_inp
    return dls

def train(learn, cb=None, epochs=1):
    "Train and give back the steps; batches as loaded are never written to"
    tape = Tape()
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[tape, *([cb] if cb else [])])
    for o in tape.steps: same(copied((o.x, o.y)), o.was)
    return tape.steps

def steps(items, model, loss_func=None, cb=None, bs=8, n_inp=None, cbs=None, **kwargs):
    "Train `model` on `items` for an epoch, mixing with `cb`"
    learn = Learner(loaders(items, bs, n_inp), model, loss_func=loss_func or CrossEntropyLossFlat(), cbs=cbs, lr=1e-3, **kwargs)
    return train(learn, cb or MixUpCallback())

def same(a, b):
    if isinstance(a, tuple): return [same(*o) for o in zip(a, b)]
    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a==b

def close(got, want, tol=1e-5):
    got,want = (tensor(o).detach().as_subclass(torch.Tensor).double() for o in (got, want))
    torch.testing.assert_close(got, want, atol=tol, rtol=tol)

def lerped(x, mix):
    "lam of each row and 1-lam of its partner, one row at a time"
    x = x.as_subclass(torch.Tensor).double()
    return torch.stack([lam*x[i] + (1-lam)*x[j] for i,(j,lam) in enumerate(pairs(mix))])

def pairs(mix): return list(zip(mix.partner.tolist(), mix.lam.tolist()))

def paired(loss, pred, yb, mix):
    "The mean over rows of `lam*loss(pred, own) + (1-lam)*loss(pred, partner's)`; `loss` takes one row, in float64"
    pred = pred.as_subclass(torch.Tensor).double()
    yb = [y.as_subclass(torch.Tensor) for y in yb]
    def one(i, j): return loss(pred[i], *(y[j] for y in yb))
    return torch.stack([lam*one(i, i) + (1-lam)*one(i, j) for i,(j,lam) in enumerate(pairs(mix))]).mean()

def cross_entropy(p, y):
    "Of one row: classes first, then positions"
    return -p.log_softmax(0).gather(0, y.long()[None]).mean()

def focal(p, y, gamma=2):
    ce = -p.log_softmax(0).gather(0, y.long()[None])
    return ((1-(-ce).exp())**gamma*ce).mean()

def bce(p, y, w=1.):
    y = y.double()
    return -(w*y*F.logsigmoid(p) + (1-y)*F.logsigmoid(-p)).mean()

def squared(p, y): return (p-y.double()).square().mean()
