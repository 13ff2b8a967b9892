"""Looking inside a fit with somebody else's model, loss or data: what reaches the model, and what is left behind."""
from contextlib import contextmanager

import torch
from common import global_hooks, hooks_on
from tape import close, lerped, train
from torch import nn

from fastai.callback import progress  # noqa: F401 patched onto Learner


def plain_state(o):
    "The settings of a loss, its parts included; what else it may remember of a batch is its own affair"
    parts = {k: plain_state(v) for k,v in o._modules.items()} if isinstance(o, nn.Module) else {}
    return {k: v for k,v in getattr(o, '__dict__', {}).items() if v is None or isinstance(v, (str, bool, int, float))} | parts

def state(learn):
    names = sorted(o.name for o in learn.cbs)  # `no_bar` puts another progress bar in the place of the first
    return dict(cbs=names, loss=plain_state(learn.loss_func), hooks=hooks_on(learn.model), everywhere=global_hooks(), was=learn.loss_func)

@contextmanager
def unchanged(learn):
    "What is done meanwhile leaves the learner's loss, callbacks and hooks as they were"
    before = state(learn)
    yield
    after = state(learn)
    assert after.pop('was') is before.pop('was')
    assert after==before

def fit(learn, cb, epochs=1):
    "The steps of a fit, with the arguments that the model got as `args`; the learner afterwards is as before"
    args = []
    hook = learn.model.register_forward_pre_hook(lambda m, o: args.append(o) if m.training else None)
    with unchanged(learn): steps = train(learn, cb, epochs)
    hook.remove()
    assert cb.mix is None and steps and len(steps)==len(args)
    for o,a in zip(steps, args): o.args = a
    return steps

def mixed(x, mix):
    "`x` as the mix has it, in float64: pasted under a mask, else one row at a time"
    x = x.as_subclass(torch.Tensor)
    return lerped(x, mix) if mix.mask is None else torch.where(mix.mask, x, x[mix.partner]).double()

def blends_inputs(steps):
    "Every input reached the model as the mix has it"
    for o in steps:
        for got,x in zip(o.args, o.x): close(got, mixed(x, o.mix))
    assert len({o.mix.lam[0].item() for o in steps})>1 or len(steps)==1
