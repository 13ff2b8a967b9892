"`show_mixed_batch` shows what training would see, and leaves no trace."
import random
from copy import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import CategoryBlock, ColReader, CrossEntropyLossFlat, DataBlock, DataLoaders, Learner
from fastai.data.load import DataLoader
from fastai.tabular.all import Categorify, Normalize, RegressionBlock, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.torch_core import TitledStr, set_seed
from fastai.vision.all import ImageBlock, MaskBlock, PILImageBW, PILMask
from fastcore.foundation import L
from fasttransform import Transform
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from fastai_mixup_ext import CutMixCallback, Mix, MixCallback, MixUpCallback, Recipe

class Fixed(Recipe):
    "lam = 0.7 for each row"
    def draw(self, batch): return Mix(batch.partner, torch.full((len(batch),), .7, device=batch.device))

def following(x, yb=(), generator=None): return torch.arange(len(x), device=x.device).roll(-1)
def fixed(): return MixCallback(Fixed(), pair=following)

def halves(head): return lambda o: (L(range(head)), L(range(head, len(o))))

def pixels(i): return np.full((8,8), 20*i, np.uint8)

def block_learner(x_block, y_block, get_y, model, axis, cbs):
    "Picture i is all 20*i"
    block = DataBlock((x_block, y_block), get_x=pixels, get_y=get_y, splitter=halves(9))
    dls = block.dataloaders(range(12), bs=6, num_workers=0, device='cpu')
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(axis=axis), cbs=cbs)

def picture_learner(cbs):
    "Even ones are cats"
    return block_learner(ImageBlock(PILImageBW), CategoryBlock, lambda i: ['cat','dog'][i%2], flat(64), -1, cbs)

def mask_learner(cbs):
    def mask(i): return PILMask.create(np.full((8,8), i%3, np.uint8))
    return block_learner(ImageBlock(PILImageBW), MaskBlock([*'abc']), mask, nn.Conv2d(1, 3, 1), 1, cbs)

def flat(n): return nn.Sequential(nn.Flatten(), nn.Linear(n, 2))

def table_learner(cbs, y='kind', block=CategoryBlock):
    df = pd.DataFrame(dict(colour=[*'rgb']*8, size=np.arange(24.), kind=['no','yes']*12, price=np.arange(24.)*10))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['colour'], cont_names=['size'], y_names=y,
                                     y_block=block(), bs=6, valid_idx=range(18, 24))
    return tabular_learner(dls, layers=[4], cbs=cbs)

class Words(Transform):
    def encodes(self, o:str): return o.split()
    def decodes(self, o): return TitledStr(' '.join(o))

def text_learner(cbs):
    df = pd.DataFrame(dict(text=[' '.join('abcdefgh'[:2+i%7]) for i in range(24)], label=['bad','good']*12))
    block = DataBlock((TextBlock(Words(), seq_len=8, min_freq=1), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
                      splitter=halves(18))
    dls,config = block.dataloaders(df, bs=6, num_workers=0, device='cpu'),awd_lstm_clas_config | dict(emb_sz=4, n_hid=4)
    return text_classifier_learner(dls, AWD_LSTM, seq_len=8, config=config, pretrained=False, cbs=cbs)

items = [(torch.full((3,8,8), i/12), i%2) for i in range(12)]

def plain_learner(cbs):
    "PyTorch's data loaders: no show_batch, nothing to decode"
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, 6, shuffle=True) for _ in range(2)))
    dls.n_inp = 1
    return Learner(dls, flat(192), loss_func=CrossEntropyLossFlat(), cbs=cbs)

def fastai_plain_learner(cbs, items=items):
    dls = DataLoaders(*(DataLoader(items, bs=6, shuffle=True, num_workers=0) for _ in range(2)))
    return Learner(dls, flat(192), loss_func=CrossEntropyLossFlat(), cbs=cbs)

learners = dict(pictures=picture_learner, masks=mask_learner, table=table_learner, text=text_learner, plain=plain_learner,
                fastai=fastai_plain_learner)
every = pytest.mark.parametrize('make', learners.values(), ids=learners)

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def random_states(): return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

def same_states(a, b): return torch.equal(a[0], b[0]) and (a[1]==b[1]).all() and a[2]==b[2]

@every
@pytest.mark.parametrize('seed', [None, 1])
def test_leaves_no_trace(make, seed):
    "Random states, learner, data loader and callback are as before, and training goes as it would have gone"
    def losses(show):
        set_seed(0)
        learn = make(MixUpCallback(seed=seed))
        set_seed(1)
        if show:
            objs = learn,learn.dls.train,learn.mix_up
            before,kept = random_states(),[copy(vars(o)) for o in objs]
            learn.show_mixed_batch()
            assert same_states(before, random_states()) and learn.mix_up.mix is None
            for o,was in zip(objs, kept): assert {*vars(o)}=={*was} and all(v is vars(o)[k] for k,v in was.items())
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return [o.item() for o in learn.recorder.losses]
    assert losses(True)==losses(False)

class Noisy:
    "Pictures with noise of its own"
    def __init__(self, rng): self.rng = rng
    def __len__(self): return 12
    def __getitem__(self, i): return torch.as_tensor(self.rng.normal(size=(3,8,8)), dtype=torch.float32), i%2

def test_generators_of_the_data_go_on_as_they_would_have():
    "Those of the data set, and of a sampler within a sampler"
    def batches(show):
        data,g = Noisy(np.random.default_rng(0)),torch.Generator().manual_seed(0)
        sampler = BatchSampler(RandomSampler(data, generator=g), 6, False)
        dls = DataLoaders(torch.utils.data.DataLoader(data, batch_sampler=sampler), [])
        dls.n_inp = 1
        if show: Learner(dls, flat(192), loss_func=CrossEntropyLossFlat(), cbs=MixUpCallback()).show_mixed_batch(max_n=1)
        return [o for b in dls.train for o in b]
    assert all(torch.equal(a, b) for a,b in zip(batches(True), batches(False), strict=True))

@every
def test_between_fits(make):
    "Also after training, and with the seed half used"
    learn = make(MixUpCallback(seed=2))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    state = {k: v.get_state().clone() for k,v in learn.mix_up._gens.items()}
    weights = [p.clone() for p in learn.model.parameters()]
    learn.show_mixed_batch()
    assert all(torch.equal(v.get_state(), state[k]) for k,v in learn.mix_up._gens.items())
    assert all(torch.equal(a, b) for a,b in zip(weights, learn.model.parameters())) and learn.mix_up.mix is None

def shown(axes): return [(ax.get_title(), np.asarray(ax.images[0].get_array(), dtype=float)) for ax in axes]

def test_pictures():
    "Decoded labels with their shares over the lerped pixels"
    wanted = {(round((.7*i+.3*j)*20), label(i, j)) for i in range(9) for j in range(9)}
    axes = picture_learner(fixed()).show_mixed_batch(max_n=3)
    assert len(axes)==3
    for title,pixel in shown(axes): assert (round(pixel.flat[0]*(255 if pixel.max()<=1 else 1)), title) in wanted

def label(i, j):
    a,b = (['cat','dog'][o%2] for o in (i, j))
    return a if a==b else f'0.7 × {a} + 0.3 × {b}'

def test_plain_picture_tensors():
    axes = plain_learner(fixed()).show_mixed_batch(max_n=3)
    for title,pixel in shown(axes):
        assert title in ('0.7 × 0 + 0.3 × 1', '0.7 × 1 + 0.3 × 0', '0', '1')
        assert any(abs((.7*i+.3*j)/12-pixel[0,0,0])<.01 for i in range(12) for j in range(12))

def test_masks():
    "Both masks lie over the picture, each as strong as its share; the partner's is not forgotten"
    for ax in mask_learner(fixed()).show_mixed_batch(max_n=3):
        assert [o.get_alpha() for o in ax.images[1:]]==pytest.approx([.6*.3, .6*.7])
        pixel,other,own = (np.asarray(o.get_array(), dtype=float).flat[0] for o in ax.images)
        assert any(abs((.7*i+.3*j)*20/255-pixel)<.01 and (own, other)==(i%3, j%3) for i in range(9) for j in range(9))

def test_mask_colours_are_those_of_their_classes():
    "Class 1 has one colour, whatever else is in its mask"
    for ax in mask_learner(fixed()).show_mixed_batch(max_n=6):
        colours = {}
        for image in ax.images[1:]:
            k = int(np.asarray(image.get_array())[0,0])
            colours[k] = image.cmap(image.norm(k))
        assert len({*colours.values()})==len(colours)

def test_pasted_masks():
    "Under a cut there is one mask"
    for ax in mask_learner(CutMixCallback()).show_mixed_batch(max_n=3): assert len(ax.images)==2

def test_table():
    df = table_learner(fixed()).show_mixed_batch(max_n=4)
    assert [*df.columns]==['colour','size','kind'] and len(df)==4
    assert all(o in ('yes','no','0.7 × yes + 0.3 × no','0.7 × no + 0.3 × yes') for o in df.kind)
    assert all(any(abs(.7*i+.3*j-float(o))<.06 for i in range(18) for j in range(18)) for o in df['size'])  # decoded: not normalised
    assert all(o in 'rgb' or o[:4]=='0.7 ' or '0.7' in o for o in df.colour)

def test_table_of_numbers():
    df = table_learner(fixed(), 'price', RegressionBlock).show_mixed_batch(max_n=4)
    assert all(any(abs(.7*i+.3*j-float(o))<.6 for i in range(0, 180, 10) for j in range(0, 180, 10)) for o in df.price)

def test_text():
    df = text_learner(fixed()).show_mixed_batch(max_n=4)
    assert len(df)==4
    texts = [' '.join('abcdefgh'[:k]) for k in range(2, 9)]
    wanted = {*texts} | {f'0.7 × {a} + 0.3 × {b}' for a in texts for b in texts}
    labels = {'bad','good','0.7 × bad + 0.3 × good','0.7 × good + 0.3 × bad'}
    for text,label in df.itertuples(index=False): assert text in wanted and label in labels

def test_given_axes():
    "They are used; no other figure appears"
    _,axes = plt.subplots(1, 2)
    got = picture_learner(fixed()).show_mixed_batch(max_n=2, ctxs=list(axes))
    assert got==list(axes) and len(plt.get_fignums())==1 and all(ax.images for ax in axes)

def test_an_axes_and_a_grid_of_axes():
    "As `subplots` returns them"
    for shape in (1,1), (2,2):
        _,axes = plt.subplots(*shape)
        assert plain_learner(fixed()).show_mixed_batch(ctxs=axes)==[*np.ravel(axes)] and all(ax.images for ax in np.ravel(axes))

@pytest.mark.parametrize('n', [0, -1, 2.5, None])
def test_bad_number(n):
    with pytest.raises(ValueError, match=f'max_n={n} must be a whole number'): plain_learner(fixed()).show_mixed_batch(n)

def test_no_callback():
    learn = picture_learner(None)
    with pytest.raises(ValueError, match=r'mixes nothing.*add_cb\(MixUpCallback\(\)\)'): learn.show_mixed_batch()

def test_what_is_never_mixed_is_not_shown_as_mixed():
    "A batch of which some are mixed at the input is"
    with pytest.raises(ValueError, match='mixes nothing'): plain_learner(MixUpCallback(p=0)).show_mixed_batch()
    inner = plain_learner(MixUpCallback(at=lambda m: m[0]))
    with pytest.raises(ValueError, match='at names only modules'): inner.show_mixed_batch()
    assert len(plain_learner(MixUpCallback(p=.1, at=lambda m: [m[0], None])).show_mixed_batch(max_n=1))==1

def test_a_failing_data_set_changes_nothing():
    learn = fastai_plain_learner(MixUpCallback(seed=1), [*items[:11], (torch.zeros(2), 0)])
    before,kept = random_states(),copy(vars(learn))
    with pytest.raises(Exception, match='size'):
        for _ in range(9): learn.show_mixed_batch()
    assert same_states(before, random_states()) and {*kept}=={*vars(learn)}

def test_a_number_is_shown_as_the_number_between():
    pics = [(x, torch.tensor(float(i))) for i,(x,_) in enumerate(items)]
    titles = [title for title,_ in shown(fastai_plain_learner(fixed(), pics).show_mixed_batch(max_n=6))]
    assert {float(o) for o in titles} <= {round(.7*i+.3*j, 3) for i in range(12) for j in range(12)}
