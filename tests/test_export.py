"""What an exported learner holds, whatever was drawn and whenever it was exported; and that it needs no package of ours to predict."""
import subprocess
import sys
import zipfile
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Datasets, ItemGetter, Learner, accuracy, load_learner
from torch import nn
from common import BS, KINDS, Raise, loaded_shapes, make_learner, make_mixer
from test_exits import OURS, check_export, leave
from fastai_mixup_ext import MixCallback, MixUpCallback, cutmix, fmix, mixup, one_of, per_batch, resizemix, until

class ExportIn(Callback):
    "Exports the learner in an event of training, amid an epoch if it is one of a batch"
    order,run_valid = 100,False
    def __init__(self, event, fname): self.fname = fname; setattr(self, event, self.save)
    def save(self): self.learn.export(self.fname)

def check_file(fname, monkeypatch):
    "No tensor in the file has the rows of a batch, and nothing there is of a kind that training alone needs"
    with loaded_shapes(monkeypatch) as shapes: learn = load_learner(fname)
    assert shapes and not [s for s in shapes if s and s[0]==BS]
    with zipfile.ZipFile(fname) as z: pickled = b''.join(z.read(n) for n in z.namelist() if n.endswith('.pkl'))
    assert not [o for o in OURS if o in pickled]
    return learn

@pytest.mark.parametrize('event', ['after_batch', 'after_train', 'after_epoch'])
@pytest.mark.parametrize('kind', KINDS)
def test_exported_by_a_callback(kind, event, tmp_path, monkeypatch):
    "While training goes on; after the last batch the callback still has its mix"
    learn,never = make_learner(kind, [make_mixer(kind, seed=1)]),make_learner(kind)
    learn.fit(2, cbs=ExportIn(event, tmp_path/'amid.pkl'))
    check_file(tmp_path/'amid.pkl', monkeypatch)
    never.model.load_state_dict(learn.model.state_dict())
    check_export(learn, never, tmp_path, monkeypatch)

def pictures(cbs=(), **kwargs):
    "A learner that reads pictures, of nothing but PyTorch's and fastai's parts"
    g = torch.Generator().manual_seed(0)
    items = list(zip(torch.rand(21, 1, 8, 8, generator=g), torch.randint(3, (21,), generator=g)))
    dsets = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(14), range(14, 21)])
    dls = dsets.dataloaders(bs=BS, device='cpu', num_workers=0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, **kwargs), items[0]

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

RECIPES = [cutmix(1.), fmix(1.), resizemix((.1,.8)), one_of(mixup(.4), cutmix(1.)), per_batch(mixup(until(.5, .4)))]

@pytest.mark.parametrize('recipe', RECIPES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('end', ['good', 'bad'])
def test_every_recipe(recipe, end, tmp_path, monkeypatch):
    "Masks and boxes stay behind, recipe and seed do not: who loads the file sees how it was trained"
    learn,item = pictures(MixCallback(recipe, p=.9, seed=3))
    fit(learn)
    if end=='bad':
        learn.add_cb(raiser := Raise('after_pred', exc := KeyboardInterrupt('stop'), 5, nth=2))
        with learn.no_bar(), learn.no_logging(): leave(learn, exc)
        learn.remove_cb(raiser)
    want = learn.predict(item)[2]
    learn.export(tmp_path/'export.pkl')
    loaded = check_file(tmp_path/'export.pkl', monkeypatch)
    assert torch.equal(loaded.predict(item)[2], want)
    assert (repr(loaded.mix.recipe), loaded.mix.seed)==(repr(recipe), 3) and not loaded.mix.state_dict()

# Where this package is not installed

elsewhere = '''
import sys, torch
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]!='fastai_mixup_ext': return
        print('missing:', name)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from fastai.basics import load_learner
learn = load_learner(sys.argv[1])
torch.save(learn.predict(torch.load(sys.argv[2]))[2], sys.argv[3])
assert 'fastai_mixup_ext' not in sys.modules
'''

def predict_elsewhere(folder, fname):
    args = [sys.executable, '-W', 'ignore', '-c', elsewhere, folder/fname, folder/'item', folder/'pred']
    return subprocess.run(args, cwd=folder, text=True, capture_output=True, timeout=300)

def test_predicts_where_this_package_is_not_installed(tmp_path):
    "As the how-to says: export without the callback; with it, the file asks for the package"
    learn,item = pictures(MixUpCallback(), path=tmp_path)
    fit(learn)
    torch.save(item, tmp_path/'item')
    with learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, MixCallback))): learn.export('plain.pkl')
    learn.export('with_callback.pkl')
    res = predict_elsewhere(tmp_path, 'plain.pkl')
    assert res.returncode==0 and 'missing' not in res.stdout, res.stderr
    assert torch.equal(torch.load(tmp_path/'pred'), learn.predict(item)[2])
    res = predict_elsewhere(tmp_path, 'with_callback.pkl')
    assert res.returncode and 'missing: fastai_mixup_ext' in res.stdout  # fastai words the error badly
