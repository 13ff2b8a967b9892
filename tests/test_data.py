"Whatever a fastai user brings: what the model is given, the one lam and pairing behind it, and the loss, against loops in float64."
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, MSELossFlat
from fastai.basics import Callback, ColReader, Learner
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastcore.foundation import L
from torch import nn

from fastai_mixup_ext import CutMixCallback, FMixCallback, MixUpCallback, by_row
from tape import bce, close, cross_entropy, focal, lerped, paired, pairs, squared, steps, train

def classes(n, k=3): return torch.arange(n) % k

def flat_linear(n_in, n_out): return nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_out))

# several float inputs

class Several(nn.Module):
    "Takes inputs of any structure"
    def __init__(self, n_in, n_out=3): super().__init__(); self.lin = nn.Linear(n_in, n_out)
    def forward(self, *xb): return self.lin(torch.cat([o.flatten(1) for o in leaves(xb)], 1))

def leaves(o):
    if isinstance(o, dict): o = o.values()
    return [o] if isinstance(o, torch.Tensor) else [t for p in o for t in leaves(p)]

def shape(o):
    "The structure of a batch: types, names, order"
    if isinstance(o, dict): return type(o), [(k, shape(v)) for k,v in o.items()]
    return type(o) if isinstance(o, torch.Tensor) else (type(o), [shape(p) for p in o])

def picture(): return torch.randn(2,4,4)
def vector(): return torch.randn(5)

structures = dict(
    picture_and_vector = (lambda: (picture(), vector()), 2),
    siamese = (lambda: (picture(), picture()), 2),
    a_pair = (lambda: ((picture(), picture()),), 1),
    nested = (lambda: (vector(), (picture(), (vector(), [picture()]))), 2),
    names = (lambda: (dict(zulu=picture(), alpha=vector(), mike=dict(a=vector())),), 1),
    named_tuple = (lambda: (dict(sides=(vector(), picture())), vector()), 2))

@pytest.mark.parametrize('name', structures)
def test_several_inputs(name):
    make,n_inp = structures[name]
    items = [(*make(), y) for y in classes(16)]
    n_in = sum(o.numel() for o in leaves(items[0][:-1]))
    for o in steps(items, Several(n_in), n_inp=n_inp):
        assert shape(o.xb)==shape(o.x)
        for got,x in zip(leaves(o.xb), leaves(o.x), strict=True): close(got, lerped(x, o.mix))
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

def test_partner_and_lam_vary():
    "So that the tests above do not compare rows with themselves"
    items = [(vector(), y) for y in classes(64)]
    o, = steps(items, flat_linear(5, 3), bs=64)
    assert sorted(o.mix.partner.tolist())==list(range(64))
    assert (o.mix.partner!=torch.arange(64)).sum()>55
    assert len(o.mix.lam.unique())>50 and .5<=o.mix.lam.min()<.7 and o.mix.lam.max()<=1

# tables

def table(n=64):
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(colour=rng.choice([*'rgb'], n), size=rng.choice([*'sml'], n), width=rng.normal(3, 2, n),
                             depth=rng.normal(0, 1, n), kind=rng.choice(['no','yes'], n),
                             price=rng.normal(10, 3, n)))

def table_loaders(y='kind', block=CategoryBlock):
    return TabularDataLoaders.from_df(table(), procs=[Categorify, FillMissing, Normalize], cat_names=['colour','size'],
                                      cont_names=['width','depth'], y_names=y, y_block=block(), bs=16, valid_idx=range(48,64))

def table_learner(*args): return tabular_learner(table_loaders(*args), layers=[8], config=dict(ps=0.))

def outputs(module, into):
    "Have `module` note its outputs"
    module.register_forward_hook(lambda m, args, out: into.append(out.detach().clone()))

def test_tabular_learner():
    learn,seen,conts = table_learner(),[],[]
    for e in learn.model.embeds: outputs(e, seen)
    tables = [e.weight.detach().clone() for e in learn.model.embeds]
    learn.model.bn_cont.register_forward_pre_hook(lambda m, args: conts.append(args[0].clone()))
    o,*_ = train(learn, MixUpCallback())
    assert o.y[0].dtype==torch.int8 and o.y[0].shape==(16,1)
    assert conts[0].shape==(16,2)
    for i,w in enumerate(tables): close(seen[i], lerped(w[o.x[0][:,i]], o.mix))
    close(conts[0], lerped(o.x[1], o.mix))
    close(o.loss, paired(cross_entropy, o.pred, [o.y[0][:,0]], o.mix))

def test_tabular_regression():
    o,*_ = train(table_learner('price', RegressionBlock), MixUpCallback())
    close(o.yb[0], lerped(o.y[0], o.mix))
    close(o.loss, squared(o.pred.double().flatten(), lerped(o.y[0], o.mix).flatten()))

# text

def reviews(n=48, longest=32):
    "The longest has whole parts of 8 words: else fastai's encoder leaves out the last words of some others, mixed or not"
    rng = np.random.default_rng(1)
    texts = [' '.join(rng.choice([*'abcdefgh'], rng.integers(2, longest) if i else longest)) for i in range(n)]
    return pd.DataFrame(dict(text=texts, label=rng.choice(['bad','good'], n)))

def text_loaders(seq_len=8):
    block = DataBlock((TextBlock(str.split, seq_len=seq_len, min_freq=1), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
                      splitter=lambda df: (L(range(32)), L(range(32, 48))))
    return block.dataloaders(reviews(), bs=16, num_workers=0)

def alone(awd, own, other, lam, seq_len, pad=1):
    "What an AWD_LSTM makes of one mixed text, as PoolingLinearClassifier pools it, with no batch around it"
    w = awd.encoder.weight
    padded = (own==pad) & (other==pad)
    begin = next(i for i in range(0, len(own), seq_len) if not padded[i])
    out = (lam*w[own] + (1-lam)*w[other])[None,begin:]
    for rnn in awd.rnns: out,_ = rnn(out)
    out = out[0][~padded[begin:]]
    return torch.cat([out[-1], out.max(0).values, out.mean(0)])

@pytest.mark.parametrize('seq_len', [8, 72])
def test_text_classifier_learner(seq_len):
    "A mixed text is read as if it were alone: mixed token by token, and as long as the longer of the two"
    dls,config = text_loaders(seq_len),awd_lstm_clas_config | dict(emb_sz=6, n_hid=7, n_layers=2)
    config |= {k: 0. for k in config if k.endswith('_p')} | dict(weight_p=1e-12)  # with 0 fastai makes the dropped weights parameters
    def learner(): return text_classifier_learner(dls, AWD_LSTM, seq_len=seq_len, config=config, drop_mult=1., ps=[0.], pretrained=False)
    learn,model = learner(),learner().model.train()
    model.load_state_dict(learn.model.state_dict())
    o,*_ = train(learn, MixUpCallback())
    own,(y,) = o.xb[0].own,o.yb
    order = [next(i for i,t in enumerate(o.x[0]) if torch.equal(t, row)) for row in own]
    assert sorted(order)==list(range(16)) and torch.equal(o.y[0][order], y)  # each text kept its label
    pooled = torch.stack([alone(model[0].module, own[i], own[j], lam, seq_len) for i,(j,lam) in enumerate(pairs(o.mix))])
    close(o.pred, model[1].layers(pooled))
    close(o.loss, paired(cross_entropy, o.pred, [y], o.mix))

class Transformer(nn.Module):
    "A small one, as tutorials write it: padding is 0"
    def __init__(self, vocab=20, d=8, n_out=3, longest=16):
        super().__init__()
        self.emb,self.pos = nn.Embedding(vocab, d, padding_idx=0),nn.Embedding(longest, d)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 16, dropout=0., batch_first=True), 1, enable_nested_tensor=False)
        self.head = nn.Linear(d, n_out)
    def forward(self, ids):
        padded = ids==0
        return self.rest(self.emb(ids), padded)
    def rest(self, x, padded):
        h = self.enc(x + self.pos.weight[:x.shape[1]], src_key_padding_mask=padded)
        return self.head(h.masked_fill(padded[...,None], 0).sum(1)/(~padded).sum(1, keepdim=True))

def padded_ids(n, longest=12, vocab=20):
    lens = torch.randint(2, longest+1, (n,1))
    return torch.randint(1, vocab, (n,longest)).where(torch.arange(longest)<lens, 0)

def one_by_one(model, ids, mix):
    "What a Transformer says of the mixed rows, each computed alone"
    w = model.emb.weight
    def one(a, b, lam): return model.rest((lam*w[a] + (1-lam)*w[b])[None], ((a==0) & (b==0))[None])[0]
    return torch.stack([one(ids[i], ids[j], lam) for i,(j,lam) in enumerate(pairs(mix))])

class Inputs(Transformer):
    "Takes what tokenizers hand over"
    def forward(self, batch): return self.rest(self.emb(batch['input_ids']), batch['attention_mask']==0)

@pytest.mark.parametrize('mask', [None, torch.Tensor.long, torch.Tensor.bool], ids=['found', 'long', 'bool'])
def test_transformer_with_padding(mask):
    "The model looks for padding itself, or is given an attention mask"
    ids = padded_ids(16)
    items = [(i if mask is None else dict(input_ids=i, attention_mask=mask(i!=0)), y) for i,y in zip(ids, classes(16))]
    model = Transformer() if mask is None else Inputs()
    before = deepcopy(model).double().train()
    o, = steps(items, model, bs=16)
    ids = o.x[0] if mask is None else o.x[0]['input_ids']
    close(o.pred, one_by_one(before, ids, o.mix))
    close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

# ratings

def test_collab_learner():
    rng = np.random.default_rng(0)
    ratings = pd.DataFrame(dict(user=rng.integers(0, 12, 64), item=rng.integers(0, 15, 64), rating=rng.uniform(1, 5, 64).astype('float32')))
    learn = collab_learner(CollabDataLoaders.from_df(ratings, bs=16, valid_pct=.25, seed=0), n_factors=4, y_range=(0.,6.))
    m = deepcopy(learn.model).double()
    o,*_ = train(learn, MixUpCallback())
    (ids,),(rating,) = o.x,o.y
    def factors(weight, col): return lerped(weight.weight[ids[:,col]], o.mix)
    want = (factors(m.u_weight, 0)*factors(m.i_weight, 1)).sum(1) + (factors(m.u_bias, 0)+factors(m.i_bias, 1)).squeeze()
    close(o.pred, torch.sigmoid(want)*6)
    close(o.yb[0], lerped(rating, o.mix))
    close(o.loss, squared(o.pred.double(), lerped(rating, o.mix).reshape(o.pred.shape)))

# series, audio, volumes

spaces = dict(series=(3,20), audio=(1,64), picture=(3,8,8), volume=(2,4,5,6))

@pytest.mark.parametrize('size', spaces.values(), ids=spaces)
def test_mixup_over_any_space(size):
    for o in steps([(torch.randn(size), y) for y in classes(16)], flat_linear(np.prod(size), 3)):
        close(o.xb[0], lerped(o.x[0], o.mix))
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

@pytest.mark.parametrize('size', spaces.values(), ids=spaces)
@pytest.mark.parametrize('cb', [CutMixCallback, FMixCallback])
def test_cut_over_any_space(size, cb):
    "Each position is wholly the row's or wholly the partner's, for all channels; lam is the share of the row's own"
    for o in steps([(torch.randn(size), y) for y in classes(16)], flat_linear(np.prod(size), 3), cb=cb()):
        x = o.x[0]
        for i,(j,lam) in enumerate(pairs(o.mix)):
            own,other = o.xb[0][i]==x[i],o.xb[0][i]==x[j]
            assert (own.all(0) | other.all(0)).all()
            if i!=j: close(own.all(0).double().mean(), lam)
        close(o.loss, paired(cross_entropy, o.pred, o.y, o.mix))

def test_uint8_pictures_are_rounded():
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(48, 3)
        def forward(self, x): return self.lin(x.float().flatten(1)/255)
    for o in steps([(torch.randint(0, 256, (3,4,4), dtype=torch.uint8), y) for y in classes(16)], Model()):
        assert o.xb[0].dtype==torch.uint8
        assert (o.xb[0].double()-lerped(o.x[0], o.mix)).abs().max()<=.5001

# a class for each position

class SoftDice(nn.Module):
    "Over the whole batch at once: no row has a loss of its own"
    def forward(self, pred, y):
        p,y = pred.softmax(1),F.one_hot(y, pred.shape[1]).movedim(-1, 1)
        return 1 - 2*(p*y).sum()/(p+y).sum()

def masks(n=16): return [(torch.randn(2,6,5), torch.randint(0, 3, (6,5))) for _ in range(n)]
def conv(): return nn.Conv2d(2, 3, 3, padding=1)

per_position = dict(
    cross_entropy = (CrossEntropyLossFlat(axis=1), cross_entropy),
    plain_cross_entropy = (nn.CrossEntropyLoss(), cross_entropy),
    a_function = (F.cross_entropy, cross_entropy),
    focal = (FocalLossFlat(axis=1), focal))

@pytest.mark.parametrize('name', per_position)
def test_segmentation(name):
    loss,row = per_position[name]
    for o in steps(masks(), conv(), loss):
        close(o.xb[0], lerped(o.x[0], o.mix))
        assert len(o.mix.lam.unique())>1
        close(o.loss, paired(row, o.pred, o.y, o.mix))

def dice(pred, y): return SoftDice()(pred.double(), y)

def test_dice_over_the_batch_gets_one_lam():
    with pytest.warns(UserWarning, match="SoftDice is not known by row"): res = steps(masks(), conv(), SoftDice())
    for o in res:
        lam = o.mix.lam[0].item()
        assert (o.mix.lam==lam).all()
        close(o.xb[0], lerped(o.x[0], o.mix))
        close(o.loss, lam*dice(o.pred, o.y[0]) + (1-lam)*dice(o.pred, o.y[0][o.mix.partner]))

def row_dice(p, y):
    "The sum over classes of 1 - dice"
    p,y = p.softmax(0),torch.stack([y==c for c in range(len(p))]).double()
    return (1 - (2*(p*y).sum((1,2))+1e-6)/((p+y).sum((1,2))+1e-6)).sum()

@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_fastai_dice(reduction):
    for o in steps(masks(), conv(), DiceLoss(reduction=reduction)):
        assert len(o.mix.lam.unique())>1
        close(o.loss, paired(row_dice, o.pred, o.y, o.mix) * (len(o.pred) if reduction=='sum' else 1/3))

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(axis=1), SoftDice()], ids=['cross_entropy', 'dice'])
def test_cut_masks_go_with_their_pixels(loss):
    for o in steps(masks(), conv(), loss, cb=CutMixCallback()):
        for i,(j,_) in enumerate(pairs(o.mix)):
            own = (o.xb[0][i]==o.x[0][i]).all(0)
            assert torch.equal(o.yb[0][i], o.y[0][i].where(own, o.y[0][j]))
        y = o.yb[0]
        if isinstance(loss, SoftDice): close(o.loss, dice(o.pred, y))
        else: close(o.loss, F.cross_entropy(o.pred.double(), y))

class Tagger(nn.Module):
    def __init__(self, flip): super().__init__(); self.emb,self.lin,self.flip = nn.Embedding(20, 6),nn.Linear(6, 3),flip
    def forward(self, ids):
        x = self.lin(self.emb(ids))
        return x.transpose(1, 2) if self.flip else x

token_losses = dict(
    flat = (CrossEntropyLossFlat(), cross_entropy, False),
    plain = (nn.CrossEntropyLoss(), cross_entropy, True),
    focal = (FocalLossFlat(), focal, False))

@pytest.mark.parametrize('loss,row,flip', token_losses.values(), ids=token_losses)
def test_class_per_token(loss, row, flip):
    items = [(torch.randint(0, 20, (7,)), torch.randint(0, 3, (7,))) for _ in range(16)]
    for o in steps(items, Tagger(flip), loss):
        close(o.loss, paired(lambda p, y: row(p if flip else p.T, y), o.pred, o.y, o.mix))

def test_ignored_tokens():
    "Of a token and its partner's, only what is not ignored counts, by its share"
    items = [(ids, torch.where(ids==0, -100, ids%3)) for ids in padded_ids(16)]
    for o in steps(items, Tagger(False), CrossEntropyLossFlat()):
        num = den = 0.
        for i,(j,lam) in enumerate(pairs(o.mix)):
            for w,k in ((lam, i), (1-lam, j)):
                for logits,y in zip(o.pred[i].double(), o.y[0][k]):
                    if y!=-100: num,den = num - w*logits.log_softmax(0)[y],den + w
        close(o.loss, num/den)

# numbers

number_losses = dict(mse=MSELossFlat(), l1=L1LossFlat(), plain=nn.MSELoss(), function=F.smooth_l1_loss)

@pytest.mark.parametrize('loss', number_losses.values(), ids=number_losses)
@pytest.mark.parametrize('n_out', [1, 3])
def test_regression(loss, n_out):
    for o in steps([(torch.randn(5), torch.randn(n_out)) for _ in range(16)], nn.Linear(5, n_out), loss):
        want = lerped(o.y[0], o.mix)
        close(o.yb[0], want)
        close(o.loss, loss(o.pred.double(), want))

pos_weight = torch.tensor([1.,5.,.2])
flat = BCEWithLogitsLossFlat(pos_weight=pos_weight)

@pytest.mark.parametrize('loss,dtype', [(nn.BCEWithLogitsLoss(pos_weight=pos_weight), torch.float32),
                                        (flat, torch.float32), (flat, torch.int64), (flat, torch.uint8), (flat, torch.bool)])
def test_multi_label(loss, dtype):
    for o in steps([(torch.randn(5), torch.randint(0, 2, (3,)).to(dtype)) for _ in range(16)], nn.Linear(5, 3), loss):
        want = lerped(o.y[0], o.mix)
        assert o.yb[0].dtype==torch.float32
        close(o.yb[0], want)
        close(o.loss, bce(o.pred.double(), want, pos_weight.double()))

def test_soft_labels():
    for o in steps([(torch.randn(5), torch.rand(3).softmax(0)) for _ in range(16)], nn.Linear(5, 3), nn.CrossEntropyLoss()):
        want = lerped(o.y[0], o.mix)
        close(o.yb[0], want)
        close(o.loss, -(want*o.pred.double().log_softmax(1)).sum(1).mean())

# several targets

class TwoHeads(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(5, 4)
    def forward(self, x): return self.lin(x)

class Joint(nn.Module):
    "Class and number together, and not linear in either"
    def forward(self, pred, kind, size): return F.cross_entropy(pred[:,:3], kind) + (pred[:,3]-size).square().mean().sqrt()

def joint(pred, kind, size): return Joint()(pred.double(), kind, size.double())

def test_integer_and_float_targets_in_one_loss():
    items = [(torch.randn(5), y, torch.randn(())) for y in classes(16)]
    with pytest.warns(UserWarning, match="Joint is not known by row"): res = steps(items, TwoHeads(), Joint(), n_inp=1)
    for o in res:
        lam = o.mix.lam[0].item()
        assert (o.mix.lam==lam).all()
        close(o.loss, lam*joint(o.pred, *o.y) + (1-lam)*joint(o.pred, *(y[o.mix.partner] for y in o.y)))

def test_integer_and_float_targets_by_row():
    "Marked, each row has its own lam"
    @by_row
    def loss(pred, kind, size, reduction='mean'):
        rows = F.cross_entropy(pred[:,:3], kind, reduction='none') * (pred[:,3]-size).abs().exp()
        return rows.mean() if reduction=='mean' else rows
    res = steps([(torch.randn(5), y, torch.randn(())) for y in classes(32)], TwoHeads(), loss, n_inp=1)
    for o in res: close(o.loss, paired(lambda p, k, s: cross_entropy(p[:3], k)*(p[3]-s.double()).abs().exp(), o.pred, o.y, o.mix))
    assert all(len(o.mix.lam.unique())>1 for o in res)

def test_two_float_targets_are_blended():
    def loss(pred, a, b): return (pred[:,:3]-a).square().mean() + (pred[:,3]-b).abs().max()
    for o in steps([(torch.randn(5), torch.randn(3), torch.randn(())) for _ in range(16)], TwoHeads(), loss, n_inp=1):
        a,b = (lerped(y, o.mix) for y in o.y)
        close(o.yb[0], a)
        close(o.yb[1], b)
        close(o.loss, loss(o.pred.double(), a, b))

# classes under a loss for numbers

def flat_bce(p, y): return F.binary_cross_entropy_with_logits(p, y.float())

category_losses = dict(bce=(BCEWithLogitsLossFlat(), bce), mse=(MSELossFlat(), squared), function=(flat_bce, bce))

@pytest.mark.parametrize('name', category_losses)
@pytest.mark.filterwarnings("ignore:flat_bce can't be taken apart")
def test_category_with_a_loss_for_numbers(name):
    "Cross-entropy is linear in the target, so that blended targets and a pair of losses are the same; squares are not"
    loss,row = category_losses[name]
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(2, 1)
        def forward(self, cat, cont): return self.lin(cont)
    for o in train(Learner(table_loaders(), Model(), loss_func=loss), MixUpCallback()):
        close(o.loss, row(o.pred.double(), lerped(o.y[0], o.mix)))

@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()], ids=['flat', 'plain'])
def test_category_that_does_not_fit_says_what_to_change(loss):
    with pytest.raises(ValueError, match=r'(?s)\(8, 3\).*CrossEntropyLossFlat.*MultiCategoryBlock'):
        steps([(torch.randn(5), y) for y in classes(16)], nn.Linear(5, 3), loss)

# no labels

def test_unlabelled_batches():
    items = [(torch.randn(5), torch.randn(5)) for _ in range(16)]
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(5, 2)
        def forward(self, a, b): return self.lin(a+b)
    res = steps(items, Model(), n_inp=2)
    assert len(res)==2
    for o in res:
        for got,x in zip(o.xb, o.x): close(got, lerped(x, o.mix))
        assert o.yb==() and o.loss is None

class Autoencode(Callback):
    "Makes the target of what the model is given"
    order = 5
    def before_batch(self): self.learn.yb = self.xb

def test_targets_made_by_another_callback():
    "They come from mixed inputs and are left as they are"
    for o in steps([(torch.randn(5),) for _ in range(16)], nn.Linear(5, 5), MSELossFlat(), n_inp=1, cbs=Autoencode()):
        close(o.xb[0], lerped(o.x[0], o.mix))
        close(o.loss, squared(o.pred.double(), lerped(o.x[0], o.mix)))

# no tensors

class Noop(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(5, 3)
    def forward(self, x, *other): return self.lin(x)

no_tensors = dict(
    strings = (lambda: (torch.randn(5), 'a text'), r"input 1(\[0\])? is a .*str.*data set or its collate function.*remove"),
    strings_in_a_dict = (lambda: (dict(x=torch.randn(5), note='a text'),), r"input 0\['note'\].*str.*collate"),
    only_strings = (lambda: ('a text',), r"batch.*str.*collate"))

@pytest.mark.parametrize('name', no_tensors)
def test_what_is_no_tensor_is_refused(name):
    make,message = no_tensors[name]
    items = [(*make(), y) for y in classes(16)]
    with pytest.raises(TypeError, match=message): steps(items, Noop(), n_inp=len(items[0])-1)

def test_a_target_that_is_no_tensor_is_refused():
    items = [(torch.randn(5), 'a text') for _ in range(16)]
    with pytest.raises(TypeError, match='target 0 is a .*make it a tensor.*collate'): steps(items, Noop())
