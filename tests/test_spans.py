"Spans of text: what is pasted and how much it counts, against loops; targets per token; transformers, AWD_LSTM and language models."
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from hypothesis import given, strategies as st
from tape import close, cross_entropy, loaders, paired, steps, train
from test_data import Transformer, alone, padded_ids, text_loaders
from test_nosync import Reads, compiled, fresh
from torch import nn

from fastai_mixup_ext import (MixCallback, MixUpCallback, across_class, blend, cutmix, deranged, mixed_accuracy, mixed_loss, mixup, one_of,
    shuffled, spanmix, until, within_class)
from fastai_mixup_ext.mix import Mix
from common import torch_27

def texts(n=8, longest=12, side='right', seed=0):
    "Ids from 1, padded with 0: behind the words, before them, or as fastai does in parts of four"
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, longest+1, (n,1), generator=g)
    pos,ids = torch.arange(longest),torch.randint(1, 50, (n,longest), generator=g)
    before = torch.zeros_like(lens) if side=='right' else longest-lens
    if side=='parts': before = before//4*4
    return ids.where((pos>=before) & (pos<before+lens), 0)

def words(x, pad): return [[t for t,i in enumerate(row) if i!=pad] for row in x.tolist()]

def by_loop(x, partner, lam, centre, pad):
    "The paper's box on the words that both have, row by row in Python: the pasted text, and the label's share"
    rows,shares,has = [],[],words(x, pad)
    for i,row in enumerate(x.tolist()):
        j = partner[i].item()
        both = [t for t in has[i] if t in has[j]]
        size,middle = int(((1-lam[i])*len(both)).item()),int((centre[i]*len(both)).item())
        chosen = both[max(middle-size//2, 0):max(middle-size//2+size, 0)]
        for t in chosen: row[t] = x[j,t].item()
        rows.append(row)
        shares.append(1-len(chosen)/len(has[i]) if has[i] else 1.)
    return torch.tensor(rows), torch.tensor(shares, dtype=torch.float64)

def same_draws(recipe, x, seed):
    "What the recipe draws, and the numbers that it drew it from"
    torch.manual_seed(seed)
    mix = recipe(x)
    torch.manual_seed(seed)
    lam = torch._sample_dirichlet(torch.full((len(x), 2), float(recipe.alpha)))[:,0]
    centre = torch.rand(len(x), 1)[:,0]
    return mix, lam, centre

sides = st.sampled_from(['right', 'left', 'parts'])

@given(sides, st.integers(0, 1000), st.sampled_from([.2, 1., 3.]), st.integers(1, 17))
def test_what_a_loop_makes(side, seed, alpha, longest):
    x = texts(7, longest, side, seed)
    if seed%3==0: x[2] = 0  # a row of padding only
    for pad in 0, None:
        mix,lam,centre = same_draws(spanmix(alpha, pad), x, seed)
        pasted,share = by_loop(x, mix.partner, lam, centre, pad)
        assert torch.equal(blend(x, mix), pasted) and mix.mask.shape==(7, 1, longest)
        close(mix.lam, share, 1e-6)

@given(sides, st.integers(0, 1000))
def test_padding_stays_where_it_was(side, seed):
    "And the share is that of the row's own words which are left"
    x = texts(9, 11, side, seed)
    x[4] = 0
    torch.manual_seed(seed)
    mix = spanmix(pad=0)(x)
    res = blend(x, mix)
    assert torch.equal(res==0, x==0)
    left = (mix.mask[:,0] & (x!=0)).sum(1).double()/(x!=0).sum(1).clamp(min=1)
    close(mix.lam[torch.arange(9)!=4], left[torch.arange(9)!=4], 1e-6)
    assert mix.lam[4]==1 and (mix.lam>=0).all() and (mix.lam<=1).all()

@given(st.integers(0, 1000), st.integers(1, 40))
def test_without_padding_it_is_cutmix(seed, longest):
    x = torch.randint(50, (6, longest))
    torch.manual_seed(seed)
    a = spanmix(1.)(x)
    torch.manual_seed(seed)
    b = cutmix(1.)(x[:,None].float())
    assert torch.equal(a.partner, b.partner) and torch.equal(a.mask, b.mask)
    close(a.lam, b.lam, 1e-6)

def test_every_share_is_as_likely():
    "With alpha=1 the length is uniform before the ends are cut off, so that the mean share is as on a series"
    torch.manual_seed(0)
    shares = torch.cat([spanmix(pad=0)(torch.randint(1, 9, (400, 50))).lam for _ in range(5)])
    series = torch.cat([cutmix()(torch.zeros(400, 1, 50)).lam for _ in range(5)])
    assert abs(shares.mean()-series.mean())<.03

def test_no_words():
    for x in torch.zeros(4, 5).long(), torch.zeros(4, 0).long():
        mix = spanmix(pad=0)(x)
        assert (mix.lam==1).all() and torch.equal(blend(x, mix), x)

# Targets

def test_targets_per_token_are_pasted_and_labels_are_not():
    x = texts()
    mix = spanmix(pad=0)(x)
    tags,label = x*2,torch.arange(8)
    ((got,),share), = mix.sources([tags])
    assert share==1 and torch.equal(got, blend(x, mix)*2)
    (own,a),(other,b) = mix.sources([label])
    assert torch.equal(own[0], label) and torch.equal(other[0], mix.partner)
    close(a, mix.lam)
    close(b, 1-mix.lam)
    (own,_),(other,_) = mix.sources([tags, label])
    assert torch.equal(own[0], got) and torch.equal(other[0], got) and torch.equal(other[1], mix.partner)

@pytest.mark.parametrize('x,y', [('tags', 'text'), ('label', 'text'), ('numbers', 'text')])
def test_loss(x, y):
    "Against sums in float64"
    ids,g = texts(),torch.Generator().manual_seed(3)
    mix = spanmix(pad=0)(ids)
    if x=='tags':
        tags,pred = torch.randint(5, ids.shape, generator=g),torch.randn(8, 5, 12, generator=g)
        want = torch.stack([cross_entropy(pred[i,:,t].double(), tags[i if mix.mask[i,0,t] else mix.partner[i],t])
            for i in range(8) for t in range(12)]).mean()
        close(mixed_loss(F.cross_entropy, pred, tags, mix), want)
    elif x=='label':
        label,pred = torch.randint(5, (8,), generator=g),torch.randn(8, 5, generator=g)
        close(mixed_loss(F.cross_entropy, pred, label, mix), paired(cross_entropy, pred, [label], mix))
    else:
        grade,pred = torch.randn(8, generator=g),torch.randn(8, generator=g)
        want = sum((pred[i]-(lam*grade[i]+(1-lam)*grade[j])).double()**2 for i,(j,lam) in enumerate(zip(mix.partner.tolist(), mix.lam)))/8
        close(mixed_loss(F.mse_loss, pred, grade, mix), want)

# In a learner

def pasted(x, mix): return torch.where(mix.mask[:,0], x, x[mix.partner])

@pytest.mark.parametrize('recipe', [spanmix(pad=0), spanmix(), one_of(spanmix(pad=0), spanmix(.3, 0)), spanmix(until(.9), 0)], ids=repr)
def test_a_transformer(recipe):
    ids = padded_ids(16)
    items = [(i, torch.tensor(k%3)) for k,i in enumerate(ids)]
    model = Transformer()
    o,*_ = steps(items, model, cb=MixCallback(recipe, seed=1), bs=16)
    assert torch.equal(o.xb[0], pasted(o.x[0], o.mix)) and not torch.equal(o.xb[0], o.x[0])
    close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

class Inputs(Transformer):
    def forward(self, batch): return self.rest(self.emb(batch['input_ids']), batch['attention_mask']==0)

@pytest.mark.parametrize('kind', [torch.Tensor.long, torch.Tensor.bool], ids=['long', 'bool'])
def test_an_attention_mask_goes_with_its_text(kind):
    ids = padded_ids(16)
    items = [(dict(input_ids=i, attention_mask=kind(i!=0)), torch.tensor(k%3)) for k,i in enumerate(ids)]
    o, = steps(items, Inputs(), cb=MixCallback(spanmix(pad=0), seed=1), bs=16)
    assert torch.equal(o.xb[0]['attention_mask'], o.x[0]['attention_mask'])
    assert torch.equal(o.xb[0]['input_ids'], pasted(o.x[0]['input_ids'], o.mix))

def awd(seq_len):
    config = awd_lstm_clas_config | dict(emb_sz=6, n_hid=7, n_layers=2)
    config |= {k: 0. for k in config if k.endswith('_p')} | dict(weight_p=1e-12)
    dls = text_loaders(seq_len)
    return text_classifier_learner(dls, AWD_LSTM, seq_len=seq_len, config=config, drop_mult=1., ps=[0.], pretrained=False)

@pytest.mark.parametrize('seq_len', [8, 72])
def test_awd_lstm(seq_len):
    "Each pasted text is read as if it were alone: it is as long as it was, and in its place"
    learn,model = awd(seq_len),awd(seq_len).model.train()
    model.load_state_dict(learn.model.state_dict())
    o,*_ = train(learn, MixCallback(spanmix(pad=1), seed=1))
    assert torch.equal(o.xb[0], pasted(o.x[0], o.mix)) and torch.equal(o.xb[0]==1, o.x[0]==1) and (o.mix.lam<1).any()
    pooled = torch.stack([alone(model[0].module, row, row, 1., seq_len) for row in o.xb[0]])
    close(o.pred, model[1].layers(pooled))
    close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

@pytest.mark.parametrize('recipe', [spanmix(), spanmix(pad=0), one_of(spanmix(), spanmix(pad=0))], ids=repr)
def test_awd_lstm_needs_its_padding(recipe):
    with pytest.raises(ValueError, match=r'spanmix\(pad=1\)'): awd(8).fit(1, cbs=MixCallback(recipe))

def test_awd_lstm_switches():
    "mixup sorts the rows by length, spans leave them"
    learn = awd(8)
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=MixCallback(one_of(mixup(1.), spanmix(pad=1)), seed=3))
    assert torch.stack(learn.recorder.losses).isfinite().all()

class Tagger(nn.Module):
    "A class for each token"
    def __init__(self, n_out=4): super().__init__(); self.emb,self.lin = nn.Embedding(50, 6),nn.Linear(6, n_out)
    def forward(self, ids): return self.lin(self.emb(ids))

@pytest.mark.parametrize('what', ['tags', 'next token'])
def test_targets_per_token_in_a_learner(what):
    x = texts(16, 9)
    y = x%4 if what=='tags' else x.roll(-1, 1)%4
    o, = steps(list(zip(x, y)), Tagger(), cb=MixCallback(spanmix(pad=0), seed=1), bs=16)
    assert torch.equal(o.xb[0], pasted(o.x[0], o.mix)) and torch.equal(o.yb[0], pasted(o.y[0], o.mix))
    want = torch.stack([cross_entropy(o.pred[i,t].double(), o.yb[0][i,t]) for i in range(16) for t in range(9)]).mean()
    close(o.loss, want)

@pytest.mark.parametrize('pair', [shuffled, deranged, within_class, across_class])
@pytest.mark.parametrize('p', [1., .5, until(.5)])
def test_composes(pair, p):
    items = [(i, torch.tensor(k%3)) for k,i in enumerate(padded_ids(32))]
    model = Transformer()
    learn = Learner(loaders(items, bs=8), model, CrossEntropyLossFlat(), metrics=mixed_accuracy())
    cb = MixCallback(one_of(mixup(.4), spanmix(pad=0), weights=[until(.5), 1]), pair=pair, p=p, at=[None], seed=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=cb)
    assert cb.mix is None

def test_a_loss_that_is_called_whole():
    "One share for the batch: a batch without padding can have it, texts of different length can't"
    def own(p, y): return F.cross_entropy(p, y)
    items = [(i, torch.tensor(k%3)) for k,i in enumerate(torch.randint(1, 20, (16, 6)))]
    with pytest.warns(UserWarning, match='one lam'): o, = steps(items, Transformer(), own, MixCallback(spanmix(), seed=1), bs=16)
    assert (o.mix.lam==o.mix.lam[0]).all() and o.mix.mask.shape==(1,1,6)
    close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))
    with pytest.raises(TypeError, match='by_row'), pytest.warns(UserWarning): steps(items, Transformer(), own, MixCallback(spanmix(pad=0)))
    with pytest.raises(TypeError, match='plain mixes|positions'): one_of(spanmix(pad=0), spanmix(pad=0), per_row=True)(texts())

# Nothing is waited for

@pytest.mark.parametrize('recipe', [spanmix(), spanmix(pad=0), spanmix(1e-3, 0)], ids=repr)
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_nothing_is_read(recipe, device):
    x,y = torch.ones(8, 6, device=device).long(),torch.zeros(8, device=device).long()
    pred = torch.randn(8, 5, device=device, requires_grad=True)
    with Reads() as reads:
        mix = recipe(x, y)
        blend(x, mix)
        mixed_loss(F.cross_entropy, pred, y, mix).backward()
        mix.sources([x])
    assert reads.seen==[]

@torch_27
def test_it_compiles_to_one_graph():
    def step(x, y, w):
        mix = spanmix(pad=0)(x, y)
        return mixed_loss(F.cross_entropy, w[blend(x, mix)].mean(1), y, mix)
    with fresh():
        f,counter = compiled(step)
        for seed in range(4): f(texts(seed=seed), torch.arange(8)%5, torch.randn(50, 5, requires_grad=True)).backward()
        assert counter.frame_count==1

def test_it_travels():
    "To a device, and with a batch"
    mix = spanmix(pad=3)(texts())
    there = mix.to('meta')
    assert there.pad==3 and type(there) is type(mix) and there.mask.is_meta and len(there)==8

# Bad input

@pytest.mark.parametrize('x', [torch.rand(4, 5), torch.rand(4, 1, 5), torch.zeros(4).long(), torch.zeros(4, 2, 3).long(),
    torch.zeros(4, 5).bool()], ids=lambda o: f'{o.dtype} {tuple(o.shape)}')
def test_only_ids_can_be_cut(x):
    with pytest.raises(ValueError, match='spanmix needs token ids.*use cutmix.*mixup'): spanmix()(x)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_dtype(dtype):
    x = texts().to(dtype)
    mix = spanmix(pad=0)(x)
    assert blend(x, mix).dtype==dtype and torch.equal(blend(x, mix)==0, x==0)

@pytest.mark.parametrize('kw,error', [(dict(pad='<pad>'), TypeError), (dict(pad=1.), TypeError), (dict(pad=True), TypeError),
    (dict(alpha=-1), ValueError), (dict(alpha='1'), TypeError)], ids=str)
def test_bad_arguments(kw, error):
    with pytest.raises(error, match=f'{next(iter(kw))}='): spanmix(**kw)

def test_by_value():
    assert spanmix(1., 0)==spanmix(pad=0) and spanmix(pad=0)!=spanmix() and hash(spanmix())==hash(spanmix(1.))
    assert repr(spanmix(pad=0))=='spanmix(alpha=1.0, pad=0)' and not spanmix(0).active(0.) and type(spanmix()(texts())) is Mix
    assert (spanmix(0)(texts()).lam==1).all()

def test_at_a_place_is_refused():
    learn = Learner(loaders([(i, torch.tensor(0)) for i in padded_ids(8)], bs=8), Transformer(), CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='spanmix needs token ids'): learn.fit(1, cbs=MixCallback(spanmix(pad=0), at=learn.model.emb))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MixUpCallback(at=learn.model.emb))
