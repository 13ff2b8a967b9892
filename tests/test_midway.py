"""What other callbacks do to ours in the middle of a fit: switch it off, share it, take it away, validate, set a mix."""
import gc
import weakref
import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelTrainException, accuracy, set_seed
from torch import nn
from torch.utils.checkpoint import checkpoint
from common import BS, KINDS, make_dls, make_learner, make_mixer
from fastai_mixup_ext import (CutMixCallback, Mix, MixCallback, MixUpCallback, balanced, by_target_distance, mixed_accuracy,
    mixup, until)

class Do(Callback):
    "Calls `f(learner)` in each training batch at one event, in one place among the others"
    run_valid = False
    def __init__(self, event, f, order=5):
        self.order = order
        setattr(self, event, lambda: f(self.learn) if self.learn.training else None)

def is_mixed(learn):
    "Does the prediction differ from that of the batch as it came?"
    with torch.no_grad(): return not torch.allclose(learn.pred, learn.model(*learn.xb))

# Switched off

@pytest.mark.parametrize('order', [-5, 5])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_batch'])
@pytest.mark.parametrize('kind', KINDS)
def test_switched_off_nothing_of_a_batch_stays(kind, event, order):
    "The batches that follow are not mixed, and metrics of the validation are those of the validation"
    metrics = [mixed_accuracy(), accuracy] if kind!='blended' else []
    learn = make_learner(kind, [cb := make_mixer(kind)], dls=make_dls(kind, n=6*BS), metrics=metrics)
    seen = []
    def off(learn):
        if learn.iter==1: cb.run = False
    def look(learn):
        if learn.iter>1: seen.append((cb.mix, cb.place, cb.sources, len(learn.yb)))
    learn.fit(1, cbs=[Do(event, off, order), Do('after_loss', look)])
    assert seen and all(o==(None, None, None, 1) for o in seen)
    if kind!='blended': assert learn.recorder.values[-1][-2]==pytest.approx(learn.recorder.values[-1][-1])
    assert cb.run  # fastai turns it on again

def test_switched_off_after_an_interrupt():
    learn = make_learner('place', [cb := make_mixer('place')])
    def stop(learn): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Do('after_pred', stop))
    cb.run,mixed = False,[]
    learn.fit(1, cbs=Do('after_pred', lambda learn: mixed.append(is_mixed(learn))))
    assert mixed and not any(mixed)

# Shared

def twins():
    cb = MixUpCallback()
    return cb,make_learner(cbs=[cb]),make_learner(cbs=[cb])

def mixes(learn):
    "Are the batches of a fit mixed?"
    seen = []
    def look(learn): seen.append(any(cb.mix is not None for cb in learn.cbs if isinstance(cb, MixCallback)))
    learn.fit(1, cbs=Do('after_pred', look))
    return seen[0] if len(set(seen))==1 else seen

@pytest.mark.parametrize('which', [0, 1])
def test_a_shared_callback_is_removed_from_the_learner_that_is_asked(which):
    cb,*learns = twins()
    assert all(map(mixes, learns))
    learns[which].remove_cb(cb)
    assert [mixes(o) for o in learns]==[which!=0, which!=1]
    assert not [o for o in learns[which].cbs if isinstance(o, MixCallback)]

@pytest.mark.parametrize('which', [0, 1])
def test_a_shared_callback_is_removed_for_a_while(which):
    cb,*learns = twins()
    with learns[which].removed_cbs(cb): assert [mixes(o) for o in learns]==[which!=0, which!=1]
    assert all(map(mixes, learns))

def test_a_callback_of_one_fit_shared_with_a_fit_inside_it():
    outer,inner,cb = make_learner(),make_learner(),MixUpCallback()
    class Inside(Callback):
        def after_epoch(self): inner.fit(1, cbs=cb)
    outer.fit(1, cbs=[cb, Inside()])
    assert not any(isinstance(o, MixCallback) for learn in (outer, inner) for o in learn.cbs) and cb.learn is None

def test_folds():
    "One list of callbacks for one learner after another"
    cbs = [MixUpCallback()]
    learns = [make_learner(cbs=cbs) for _ in range(3)]
    assert all(map(mixes, learns)) and len({id(learn.mix_up) for learn in learns})==3

# Validation within a batch

class Within(Callback):
    "Validates in the middle of a training batch, and puts all back that it uses"
    order,run_valid = 5,False
    def __init__(self, event): setattr(self, event, self.validate)
    def validate(self):
        if not self.training: return
        learn = self.learn
        kept = {k:vars(learn)[k] for k in 'xb yb pred loss loss_grad training dl iter n_iter epoch'.split() if k in vars(learn)}
        state = torch.get_rng_state()
        learn.validate()
        torch.set_rng_state(state)
        for k,v in kept.items(): setattr(learn, k, v)
        learn.model.train()

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_goes_on_after_a_validation_within_it(kind, event):
    def losses(cbs):
        set_seed(0)
        learn,res = make_learner(kind, [make_mixer(kind)]),[]
        learn.remove_cb(learn.recorder)
        torch.manual_seed(1)
        learn.fit(1, cbs=[*cbs, Do('before_backward', lambda learn: res.append(learn.loss.item()), 50)])
        return res
    assert losses([Within(event)])==losses([])

# Ended by an error

def test_the_words_of_an_error_are_kept_when_the_callback_is_removed():
    learn = make_learner()
    learn.loss_func = nn.CrossEntropyLoss()
    def fail(learn):
        learn.pred = learn.pred[:,:1]
        raise ValueError('my own words')
    with pytest.raises(ValueError, match='my own words'): learn.fit(1, cbs=[MixUpCallback(), Do('after_pred', fail)])
    assert not any(isinstance(cb, (MixCallback, Do)) for cb in learn.cbs)
    learn.fit(1, cbs=MixUpCallback())

@pytest.mark.parametrize('exc', [KeyboardInterrupt, CancelBatchException, CancelTrainException, ValueError])
def test_other_callbacks_find_the_targets_after_an_exit_before_the_loss(exc):
    "As they do without ours"
    learn = make_learner(cbs=[MixUpCallback()])
    def leave(learn): raise exc('left')
    seen = []
    class Look(Callback):
        order,run_valid = -5,False
        def after_cancel_batch(self): seen.append(len(self.yb))
        def after_cancel_train(self): seen.append(len(self.yb))
        def after_batch(self): seen.append(len(self.yb))
    try: learn.fit(1, cbs=[Look(), Do('after_pred', leave)])
    except (KeyboardInterrupt, ValueError): seen.append(len(learn.yb))
    assert seen and set(seen)=={1}

def test_a_model_is_freed_while_the_callback_is_kept():
    cb,learn = MixUpCallback(at=lambda model: [None, model[2]]),make_learner()
    def stop(learn): raise KeyboardInterrupt
    try: learn.fit(1, cbs=[Do('after_pred', stop), cb])
    except KeyboardInterrupt as e: e.__traceback__ = None
    ref = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert ref() is None and cb.learn is None
    assert mixes(make_learner(cbs=[cb]))

# A mix that is set

@pytest.mark.parametrize('rows', [1, BS-1, BS+1])
@pytest.mark.parametrize('kind', ['labels', 'blended'])
def test_a_mix_of_other_rows_is_refused_where_it_is_set(kind, rows):
    learn = make_learner(kind, [cb := make_mixer(kind)])
    def put(learn): cb.mix = Mix(torch.zeros(rows, dtype=torch.int64), torch.full((rows,), .7))
    with pytest.raises(ValueError, match=f'mix has {rows} rows, but the batch has {BS}'): learn.fit(1, cbs=Do('after_pred', put))

def test_a_mix_is_refused_after_the_loss():
    learn = make_learner(cbs=[cb := MixUpCallback()])
    def put(learn): cb.mix = cb.mix
    with pytest.raises(RuntimeError, match="can't be set any more.*after_pred"): learn.fit(1, cbs=Do('after_loss', put))

def test_setting_a_mix_warns_of_nothing(recwarn):
    "fastai calls a `MixCallback` `mix`, so the learner has an attribute of that name"
    learn = make_learner(cbs=[cb := MixCallback(mixup(.4))])
    def put(learn): cb.mix = cb.mix
    learn.fit(1, cbs=Do('after_pred', put))
    assert not [o for o in recwarn if 'shadowing' in str(o.message)]

def test_the_metric_goes_by_targets_that_another_sets_behind_us():
    learn = make_learner(cbs=[MixUpCallback()], metrics=mixed_accuracy())
    learn.recorder.train_metrics,learn.recorder.valid_metrics = True,False
    def put(learn): learn.yb = (learn.pred.argmax(-1),)
    learn.fit(1, cbs=Do('after_pred', put))
    assert learn.recorder.values[-1][-1]==1

# Added late, or with other inputs

def test_a_second_callback_added_in_the_middle_is_refused():
    learn = make_learner(cbs=[MixUpCallback()])
    class Add(Callback):
        def before_epoch(self): self.learn.add_cb(CutMixCallback())
    with pytest.raises(ValueError, match='would mix the same batches'): learn.fit(1, cbs=Add())

def test_removed_before_the_fit_began():
    learn = make_learner(cbs=[MixUpCallback()])
    class Remove(Callback):
        order = -5
        def before_fit(self): self.learn.remove_cb(MixUpCallback)
    learn.fit(1, cbs=Remove())

@pytest.mark.parametrize('other', [torch.tensor(.3), torch.zeros(1, 3)], ids=['number', 'row'])
def test_a_first_input_without_rows_is_refused(other):
    learn = make_learner(cbs=[MixUpCallback()])
    def add(learn): learn.xb = (other, *learn.xb)
    with pytest.raises(ValueError, match=f'input 0 has shape .* but another has {BS} rows'):
        learn.fit(1, cbs=Do('before_batch', add, -5))

class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a,self.b,self.reentrant = nn.Linear(13, 8),nn.Linear(8, 3),reentrant
    def forward(self, x): return checkpoint(lambda x: self.b(x).tanh(), self.a(x), use_reentrant=self.reentrant)

@pytest.mark.parametrize('reentrant', [True, False])
def test_a_place_in_a_checkpointed_part_is_refused(reentrant):
    "The backward pass would compute the part anew, without the mix"
    learn = make_learner(cbs=[MixUpCallback(at=lambda model: model.b)])
    learn.model = Checkpointed(reentrant)
    with pytest.raises(RuntimeError, match='Linear lies in a checkpointed part.*name a module outside'): learn.fit(1)
    learn = make_learner(cbs=[MixUpCallback(at=lambda model: model.a)])
    learn.model = Checkpointed(reentrant)
    learn.fit(1)

@pytest.mark.parametrize('args,exc,match', [
    (dict(pair=by_target_distance), TypeError, 'pair=.*must be a pairing policy'), (dict(pair=balanced), TypeError, 'pair=.*must be'),
    (dict(p=until), TypeError, 'p=.*must be a number'), (dict(alpha=until), TypeError, 'alpha=.*must be a finite number'),
    (dict(at=nn.Linear), TypeError, 'at=.*must be'), (dict(seed=2**70), ValueError, 'seed=.*64 bits')],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else '')
def test_a_class_in_the_place_of_its_object_is_refused(args, exc, match):
    with pytest.raises(exc, match=match): MixUpCallback(**args)

def test_what_at_names_is_modules():
    with pytest.raises(TypeError, match='at names 5; it must name a module'): make_learner(cbs=[MixUpCallback(at=lambda model: 5)]).fit(1)

def test_what_at_names_may_be_any_iterable():
    learn,places = make_learner(cbs=[cb := MixUpCallback(at=lambda model: (m for m in [model[0], model[2]]))]),[]
    learn.fit(3, cbs=Do('after_pred', lambda learn: places.append(cb.place.module)))
    assert set(places)<={learn.model[0], learn.model[2]} and places

# The loss

def add_ten(learn): learn.loss_grad = learn.loss_grad+10
def add_ten_in_place(learn): learn.loss_grad += 10

@pytest.mark.parametrize('change', [add_ten, add_ten_in_place])
@pytest.mark.parametrize('order', [-3, 0])
@pytest.mark.parametrize('kind', ['labels', 'ids', 'place'])
def test_a_loss_that_is_changed_before_it_is_mixed_is_refused(kind, order, change):
    "A penalty would be lost; the learner is afterwards as it was"
    learn,loss = make_learner(kind, [Do('after_loss', change, order), make_mixer(kind)]),[]
    with pytest.raises(RuntimeError, match='a callback changed the loss before it was mixed; let it come after'): learn.fit(1)
    assert len(learn.yb)==1
    learn = make_learner(kind, [make_mixer(kind), Do('after_loss', lambda learn: loss.append(learn.loss_grad.item()), 0),
        Do('after_loss', change, 1), Do('before_backward', lambda learn: loss.append(learn.loss_grad.item()), 2)])
    learn.fit(1)
    assert all(abs(b-a-10)<1e-5 for a,b in zip(loss[::2], loss[1::2]))

def test_a_compiled_model_has_no_places():
    learn = make_learner(cbs=[MixUpCallback(at=lambda model: model.children())])
    learn.model.compile(backend='eager')  # in place
    learn.fit(1)
    learn.model = torch.compile(learn.model, backend='eager')
    with pytest.raises(ValueError, match='at: the model is compiled.*compile it in place, model.compile'): learn.fit(1)
