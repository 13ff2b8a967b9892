"What is mixed at a place, seen from inside: for tests with fastai's models and with those of other libraries."
from contextlib import ExitStack

from common import global_hooks, hooks_on
from fastai_mixup_ext import MixUpCallback
from fastai_mixup_ext.places import find_places
from fastai_mixup_ext.tensors import first
from tape import close, cross_entropy, lerped, paired, train
from torch.nn.modules.module import register_module_forward_hook

def seen_at(learn, module, **kwargs):
    "The steps of a fit that is mixed at `module`, and its first output tensor in each call: before it is mixed, and after"
    before,after = [],[]
    def into(calls): return lambda m, args, out: calls.append(first(out).detach().clone()) if m is module and m.training else None
    with ExitStack() as stack:  # global hooks come before those of a module, in the order in which they were set
        for hook in register_module_forward_hook(into(before)), module.register_forward_hook(into(after)): stack.callback(hook.remove)
        steps = train(learn, MixUpCallback(1., at=[module], seed=1, **kwargs))
    return steps, before, after

def mixes_at_each_stage(learn, tol=1e-5, axis_loss=cross_entropy):
    "At each place that 'stages' names, the output is that of a loop in float64, and so is the loss; the learner is left as it was"
    places = find_places('stages', learn.model)
    assert places[0] is None and len(places)>1
    for module in places[1:]:
        loss_func,cbs = learn.loss_func,names(learn)
        steps,before,after = seen_at(learn, module)
        assert len(steps)==len(before)==len(after)>0
        for o,x,z in zip(steps, before, after):
            close(z, lerped(x, o.mix), tol)
            assert (x!=z).any()
            close(o.loss, paired(axis_loss, o.pred, o.y, o.mix), tol)
        assert learn.loss_func is loss_func and names(learn)==cbs and not hooks_left(learn.model) and not global_hooks()
    return places

def names(learn): return sorted(o.name for o in learn.cbs)

def hooks_left(model): return [o for o in hooks_on(model) if not o[0].startswith('layers.0')]  # a U-net's encoder has hooks of its own
