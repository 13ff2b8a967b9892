"""However training ends, the learner is as if it had never mixed: exits x events x exceptions x kinds of data."""
import zipfile
import pytest, torch
from fastai.basics import Callback, load_learner
from fastai.callback import schedule  # noqa: F401  lr_find
from fastai.callback.core import CancelBatchException, event
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.torch_core import set_seed
from torch.nn import functional as F
from common import (BS, KINDS, N, Raise, TripCE, Watch, arm, armed, cancel, covering, global_hooks, hooks_on, loaded_shapes, make_items,
    make_learner, make_mixer)
from fastai_mixup_ext import MixUpCallback, mixed_loss

EVENTS = [e for e in vars(event) if e.startswith(('before_', 'after_')) and e!='after_create']
OFTEN = dict(before_batch=3, after_pred=3, after_loss=3, after_batch=3,  # times in an epoch
    before_backward=2, after_backward=2, before_step=2, after_step=2)
CANCELS = 'batch', 'backward', 'step', 'train', 'validate', 'epoch', 'fit'
OURS = b'MixedIds', b'RemovableHandle', b'_Away', b'Scratch', b'_Batch', b'places'  # what no export may name

def exceptions(): return [KeyboardInterrupt('stop'), RuntimeError('stop'), MemoryError('stop'), *map(cancel, CANCELS)]

def leave(learn, exc, **kwargs):
    "Fit until `exc`, which nothing may replace by another"
    try: learn.fit(1, **kwargs)
    except BaseException as e: assert e is exc, f"{exc!r} became {e!r}"

def check_clean(learn, never, loss):
    "The loss, the hooks and the predictions are those of `never`, which never mixed, with the same weights"
    never.model.load_state_dict(learn.model.state_dict())
    preds = learn.get_preds()[0]
    assert torch.equal(preds, never.get_preds()[0]) and type(preds) is torch.Tensor
    assert learn.loss_func is loss and not learn.assigned and loss.reduction=='mean'
    assert not hooks_on(learn.model) and not global_hooks()

def check_export(learn, never, path, monkeypatch):
    "What is exported predicts the same, and holds nothing of training"
    item = make_items(learn.kind)[0]
    want = never.predict(item)[2]
    assert torch.equal(learn.predict(item)[2], want)
    learn.export(path/'export.pkl')
    with loaded_shapes(monkeypatch) as shapes: loaded = load_learner(path/'export.pkl')
    assert torch.equal(loaded.predict(item)[2], want)
    assert shapes and not [s for s in shapes if s and s[0] in (BS, N)]
    with zipfile.ZipFile(path/'export.pkl') as z: pickled = b''.join(z.read(n) for n in z.namelist() if n.endswith('.pkl'))
    assert not [o for o in OURS if o in pickled]

PLACES = [(where, order) for where in EVENTS for order in (-5, 5)]  # in callbacks before and after ours
PLACES += [('forward', 0), ('loss', 0), ('backward', 0)]
CASES = covering((where, order, kind) for where,order in PLACES for kind in KINDS)

def leave_at(learn, where, order, exc, nth=1, cbs=()):
    raiser = Raise(where, exc, order, nth)
    arm(where, exc)
    leave(learn, exc, cbs=[*cbs, raiser])
    assert not armed(where) or raiser.nth<=0, "the exception was never raised"
    arm(None, None)

@pytest.mark.parametrize('where,order,kind', CASES)
def test_any_exit(kind, where, order, tmp_path, monkeypatch):
    "One learner leaves by every exception in turn, each time in another batch, and is clean each time"
    cb = make_mixer(kind)
    learn,never = make_learner(kind, [cb]),make_learner(kind)
    loss = learn.loss_func
    for i,exc in enumerate(exceptions()):
        leave_at(learn, where, order, exc, nth=1 + i % OFTEN.get(where, 1))
        check_clean(learn, never, loss)
        assert cb.mix is None
    check_export(learn, never, tmp_path, monkeypatch)
    mixed = Watch('after_pred', lambda learn: cb.mix)
    learn.fit(1, cbs=mixed)
    assert len(mixed.seen)==2 and None not in mixed.seen and learn.loss_func is loss

@pytest.mark.parametrize('kind', KINDS)
def test_any_exit_of_a_callback_of_one_fit(kind, tmp_path, monkeypatch):
    "`fit(cbs=...)` takes the callback away at once, before it sees another event"
    learn,never = make_learner(kind),make_learner(kind)
    loss,cbs = learn.loss_func,list(learn.cbs)
    for where,order in PLACES:
        for exc in KeyboardInterrupt('stop'), RuntimeError('stop'), cancel('batch'), cancel('fit'):
            leave_at(learn, where, order, exc, cbs=[make_mixer(kind)])
            check_clean(learn, never, loss)
            assert list(learn.cbs)==cbs and not hasattr(learn, 'mix_up')
    learn.fit(1)
    check_clean(learn, never, loss)
    check_export(learn, never, tmp_path, monkeypatch)

@pytest.mark.parametrize('kept', [True, False], ids=['kept', 'fit(cbs=)'])
@pytest.mark.parametrize('first', ['model', 'part', 'validate', 'fit'])
def test_the_first_thing_after_an_exit(first, kept):
    "A model that was to be mixed inside works at once, whoever calls it or a part of it next"
    x = torch.stack([x for x,_ in make_items()])
    for where,order in PLACES:
        cbs = [make_mixer('place')]
        learn = make_learner('place', cbs if kept else [])
        leave_at(learn, where, order, KeyboardInterrupt('stop'), cbs=[] if kept else cbs)
        body,_,place,_,head = learn.model
        inside = F.linear(F.linear(x, body.weight, body.bias), place.weight, place.bias)
        if first=='part': assert torch.equal(place(body(x)), inside), where
        if first=='model': assert torch.equal(learn.model(x), F.linear(inside.relu(), head.weight, head.bias)), where
        if first in ('validate', 'fit'): learn.validate() if first=='validate' else learn.fit(1)
        if first!='part': assert not global_hooks()

@pytest.mark.parametrize('kind', KINDS)
def test_lr_find(kind, tmp_path):
    "It ends by a cancelled fit, which changes nothing; an interrupted one too"
    cb = make_mixer(kind)
    learn,never = make_learner(kind, [cb], path=tmp_path),make_learner(kind)
    loss,before = learn.loss_func,[p.clone() for p in learn.model.parameters()]
    learn.lr_find(num_it=20, show_plot=False)
    assert all(map(torch.equal, before, learn.model.parameters()))
    check_clean(learn, never, loss)
    learn.add_cb(Raise('after_loss', KeyboardInterrupt('stop'), 5, nth=7))
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=20, show_plot=False)
    learn.remove_cb(Raise)
    check_clean(learn, never, loss)
    assert cb.mix is None

def test_a_loss_replaced_between_fits_is_the_loss(tmp_path):
    "After a good end or a bad one, the next fit trains with the loss that is there"
    learn = make_learner(cbs=[cb := MixUpCallback()])
    right = Watch('after_loss', lambda learn: (learn.loss.item(), mixed_loss(learn.loss_func, learn.pred, learn.yb, cb.mix).item()))
    for loss in TripCE(), CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(), F.cross_entropy, torch.nn.MultiMarginLoss():
        learn.loss_func = loss
        learn.assigned.clear()
        learn.fit(1, cbs=right)
        leave(learn, exc := RuntimeError('stop'), cbs=[right, Raise('after_pred', exc, 5, nth=2)])
        assert learn.loss_func is loss and not learn.assigned
    assert len(right.seen)==5*3 and all(a==pytest.approx(b, rel=1e-6) for a,b in right.seen)
    assert len({round(a, 5) for a,_ in right.seen})==15

def test_a_loss_replaced_during_a_fit_is_the_loss():
    "A callback may change the loss from batch to batch; it is what `learn.loss_func` says now"
    learn = make_learner(cbs=[cb := MixUpCallback()])
    class Swap(Callback):
        order = -3
        def after_pred(self): self.learn.loss_func = CrossEntropyLossFlat() if self.iter%2 else LabelSmoothingCrossEntropyFlat(eps=.5)
    right = Watch('after_loss', lambda learn: (learn.loss.item(), mixed_loss(learn.loss_func, learn.pred, learn.yb, cb.mix).item()))
    learn.fit(2, cbs=[Swap(), right])
    assert len(right.seen)==4 and all(a==pytest.approx(b, rel=1e-6) for a,b in right.seen)

# The live mix

INNER = 'before_batch after_pred after_loss before_backward after_backward before_step after_step after_cancel_batch after_batch'
OUTER = 'before_train after_train before_validate after_validate after_epoch after_fit'

@pytest.mark.parametrize('kind', KINDS)
def test_mix_is_that_of_the_current_batch(kind):
    "One mix for each training batch, from `before_batch` (for `place`: from the forward) to `after_batch`; none elsewhere"
    cb = make_mixer(kind)
    learn = make_learner(kind, [cb])
    inner,outer = Watch(INNER, lambda learn: (learn.training, learn.iter, cb.mix)),Watch(OUTER, lambda learn: cb.mix)
    inner.run_valid = True
    learn.fit(2, cbs=[inner, outer])
    train = [m for training,_,m in inner.seen if training]
    assert all(m is None for training,_,m in inner.seen if not training) and all(m is None for m in outer.seen)
    if kind=='place': train = [m for i,m in enumerate(train) if i%8]  # at before_batch it is not drawn yet
    assert None not in train and len({id(m) for m in train})==4 and all(len(m)==BS for m in train)

@pytest.mark.parametrize('off', [dict(alpha=0), dict(p=0), dict(alpha=lambda t: 0), dict(p=lambda t: 0)])
def test_no_mix_no_change(off):
    "Switched off, the callback draws nothing and trains as if it were not there"
    ends = []
    for cbs in [], [cb := MixUpCallback(**off)]:
        set_seed(1)
        learn = make_learner(cbs=cbs)
        learn.fit(2, cbs=(seen := Watch('after_batch', lambda learn: cb.mix)) if cbs else None)
        ends.append([torch.random.get_rng_state(), *learn.model.parameters()])
    assert seen.seen==[None]*4 and all(map(torch.equal, *ends))

@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_cancelled_before_it_was_mixed_has_no_mix(kind):
    "An earlier callback may cancel a batch in `before_batch`: the mix of the batch before is over by then"
    cb = make_mixer(kind)
    learn = make_learner(kind, [cb])
    seen = Watch('after_batch', lambda learn: cb.mix)
    learn.fit(1, cbs=[Raise('before_batch', CancelBatchException('stop'), -5, nth=2), seen])
    assert seen.seen[0] is not None and seen.seen[1] is None

@pytest.mark.parametrize('where,order', [('before_batch', 5), ('after_pred', -5), ('after_pred', 5), ('after_loss', -5)])
def test_a_cancelled_batch_ends_with_its_targets(where, order):
    "Callbacks after ours find the labels in `after_batch`, wherever the batch was cancelled"
    learn = make_learner(cbs=[MixUpCallback()])
    seen = Watch('after_batch', lambda learn: learn.yb)
    learn.fit(1, cbs=[Raise(where, CancelBatchException('stop'), order, nth=2), seen])
    assert [y.shape for y, in seen.seen]==[(BS,)]*2
