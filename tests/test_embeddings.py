"What models do with ids before and after they embed them: mixed ids answer as the hand-computed mix of the two rows would."
import copy
import operator
import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from fastai.text.models.awdlstm import EmbeddingDropout
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastai_mixup_ext import Mix, cutmix
from fastai_mixup_ext.embeddings import MixedIds, by_length, mix_input
from tape import close

n,t,vocab = 4,6,10
own = torch.tensor([[1,2,3,4,0,0], [5,3,6,0,0,0], [2,2,7,8,1,0], [4,8,0,0,0,0]])  # 0 is padding, 9 a token for the class
partner,lam = torch.tensor([1,2,3,0]),torch.tensor([.9,.6,.7,.8])
other = own[partner]
l1,l2 = lam[:,None],lam[:,None,None]
padded = torch.tensor([[0,0,0,0,1,1], [0,0,0,0,0,1], [0,0,0,0,0,1], [0,0,0,0,1,1]]).bool()  # by eye: where both are
w = torch.randn(6*vocab, 5, generator=torch.Generator().manual_seed(0))
emb = nn.Embedding.from_pretrained(w)
vectors = l2*w[own] + (1-l2)*w[other]
cls = torch.full((n,1), 9)
hidden = torch.randn(n, t, 5, generator=torch.Generator().manual_seed(1))
row = torch.arange(n)

def ids(): return mix_input(own.clone(), Mix(partner, lam))

def both(f):
    "Of the rows and of their partners, lerped row by row"
    a,b = f(own),f(other)
    share = lam.view(-1, *[1]*(a.dim()-1))
    return share*a + (1-share)*b

def equal(got, want):
    assert type(got) in (torch.Tensor, nn.Parameter)
    if want.dtype==torch.bool: assert torch.equal(got, want)
    else: close(got, want)

def named(cases): return pytest.mark.parametrize('f,want', cases.values(), ids=cases)

# every way to the embedding

ways = dict(
    module = (lambda x: emb(x), vectors),
    function = (lambda x: F.embedding(weight=w, input=x), vectors),
    half = (lambda x: F.embedding(x, w.half()).float(), (l2*w[own].half().float() + (1-l2)*w[other].half().float()).half().float()),
    double = (lambda x: F.embedding(x, w.double()), vectors),
    indexing = (lambda x: w[x], vectors),
    index_select = (lambda x: w.index_select(0, x.flatten()).view(n, t, 5), vectors),
    one_hot = (lambda x: F.one_hot(x, vocab).float() @ w[:vocab], vectors),
    bag = (lambda x: F.embedding_bag(x, w), vectors.mean(1)),
    bag_module = (lambda x: nn.EmbeddingBag.from_pretrained(w, mode='sum')(x), vectors.sum(1)),
    counts = (lambda x: F.one_hot(x, vocab).sum(1).float(), both(lambda x: F.one_hot(x, vocab).sum(1).float())),
    as_numbers = (lambda x: x/vocab, both(lambda x: x/vocab)),
    checkpointed = (lambda x: checkpoint(emb, x, use_reentrant=False), vectors),
    functional_call = (lambda x: torch.func.functional_call(emb, dict(weight=w), (x,)), vectors))

@named(ways)
def test_ways_to_embed(f, want): equal(f(ids()), want)

# every way to slice and join before it

moves = dict(
    columns = (lambda x: torch.stack([emb(x[:,i]) for i in range(x.size(1))], 1), vectors),
    columns_iterated = (lambda x: torch.stack([emb(o) for o in x.T], 1), vectors),
    rows_iterated = (lambda x: torch.stack([emb(o) for o in x]), vectors),
    unbind = (lambda x: torch.stack([emb(o) for o in x.unbind(1)], 1), vectors),
    chunk = (lambda x: torch.cat([emb(o) for o in x.chunk(3, 1)], 1), vectors),
    split = (lambda x: torch.cat([emb(o) for o in torch.split(x, 4, dim=1)], 1), vectors),
    real_rows_of_a_chunk = (lambda x: emb(x[:(x[:,4]!=0).long().sum(), 2:4]), vectors[:2,2:4]),
    to_the_longest = (lambda x: emb(x[:,:(x!=0).sum(1).max()]), vectors[:,:5]),
    not_padding = (lambda x: emb(x[x!=0]), vectors[~padded]),
    viewed = (lambda x: emb(x.view(-1)).view(n, t, -1), vectors),
    flattened = (lambda x: emb(x.flatten()).view(n, t, -1), vectors),
    reshaped = (lambda x: emb(x.reshape(2, -1)).view(n, t, -1), vectors),
    ravel = (lambda x: emb(x.ravel()).view(n, t, -1), vectors),
    transposed = (lambda x: emb(x.t().contiguous()).transpose(0, 1), vectors),
    flipped = (lambda x: emb(x.flip(1)), vectors.flip(1)),
    reordered = (lambda x: emb(x[[2,0,3,1]]), vectors[[2,0,3,1]]),
    repeated = (lambda x: emb(x.repeat(2, 1)), torch.cat([vectors, vectors])),
    expanded = (lambda x: emb(x[:,None].expand(n, 2, t)), torch.stack([vectors, vectors], 1)),
    types = (lambda x: emb(x.int().to('cpu').long()), vectors),
    offsets = (lambda x: emb(x + vocab*torch.arange(t)), both(lambda x: w[x + vocab*torch.arange(t)])),
    masked_fill = (lambda x: emb(x.masked_fill(x==0, 9)), both(lambda x: w[x.masked_fill(padded, 9)])),
    where = (lambda x: emb(torch.where(x==0, 9, x)), both(lambda x: w[x.masked_fill(padded, 9)])),
    cls = (lambda x: emb(torch.cat([cls, x], 1)), torch.cat([w[cls], vectors], 1)),
    cls_of_its_kind = (lambda x: emb(torch.cat([x.new_full((n,1), 9), x], dim=1)), torch.cat([w[cls], vectors], 1)),
    cls_named = (lambda x: emb(torch.cat(tensors=[cls, x], dim=1)), torch.cat([w[cls], vectors], 1)),
    cls_by_padding = (lambda x: emb(F.pad(x, (1,0), value=9)), torch.cat([w[cls], vectors], 1)),
    cls_written = (lambda x: emb(write(x.clone(), (slice(None), 0), 9)), torch.cat([w[cls], vectors[:,1:]], 1)),
    cls_then_bag = (lambda x: F.embedding_bag(torch.cat([cls, x], 1), w), torch.cat([w[cls], vectors], 1).mean(1)),
    stacked = (lambda x: emb(torch.stack([x, x.flip(1)], 1)), torch.stack([vectors, vectors.flip(1)], 1)))

def write(x, where, value):
    x[where] = value
    return x

@named(moves)
def test_moves(f, want): equal(f(ids()), want)

# what is asked of ids

equal_lens = (~padded).sum(1)

questions = dict(
    eq = (lambda x: x==0, padded), eq_method = (lambda x: x.eq(0), padded), eq_function = (lambda x: torch.eq(x, 0), padded),
    reflected = (lambda x: 0==x, padded),
    ne = (lambda x: x!=0, ~padded), gt = (lambda x: x>0, ~padded), ge = (lambda x: x>=1, ~padded),
    lt = (lambda x: x<1, padded), le = (lambda x: x<=0, padded),
    less = (lambda x: x.less(1), padded), less_equal = (lambda x: x.less_equal(0), padded),
    to_bool = (lambda x: x.bool(), ~padded), not_bool = (lambda x: ~x.bool(), padded),
    logical_not = (lambda x: torch.logical_not(x), padded),
    isin = (lambda x: torch.isin(x, torch.tensor([0])), padded),
    lengths = (lambda x: (x!=0).sum(1), equal_lens),
    positions = (lambda x: x.ne(0).int().cumsum(1)*x.ne(0), (~padded).int().cumsum(1)*~padded),  # RoBERTa's
    zeros = (lambda x: torch.zeros_like(x), torch.zeros(n, t).long()), ones = (lambda x: x.new_ones(2, 3), torch.ones(2, 3).long()))

@named(questions)
def test_questions(f, want): equal(f(ids()), want)

def test_shape_and_kind():
    x = ids()
    assert (x.shape, x.dtype, x.device, x.dim(), len(x), x.numel())==((n,t), torch.int64, own.device, 2, n, n*t)

# ids as an index

indexes = dict(
    argmax_pooling = (lambda x: hidden[row, x.argmax(-1)], both(lambda x: hidden[row, x.argmax(-1)])),  # CLIP's: the end has the largest id
    gather = (lambda x: hidden.gather(1, x.argmax(-1)[:,None,None].expand(n, 1, 5)), both(lambda x: hidden[row, x.argmax(-1)][:,None])),
    last_token = (lambda x: hidden[row, (x!=0).sum(1)-1], hidden[row, equal_lens-1]),
    positions_expanded = (lambda x: emb(x) + emb(torch.arange(t).expand_as(x)), vectors + w[:t]),
    positions_moved = (lambda x: emb(x) + emb(torch.arange(t).to(x)), vectors + w[:t]))

@named(indexes)
def test_ids_as_an_index(f, want): equal(f(ids()), want)

# written into something that can't carry a mix

behind_first = slice(None),slice(1, None)
written = dict(
    setitem = lambda x: emb(write(torch.zeros(n, t+1).long(), behind_first, x)),  # shifted to the right, after a start token
    setitem_new = lambda x: emb(write(x.new_zeros(n, t+1), behind_first, x)),
    copy = lambda x: emb(torch.zeros(n, t).long().copy_(x)),
    scatter = lambda x: torch.zeros(n, t, vocab).scatter_(2, x[...,None], 1.) @ w[:vocab],
    numpy = lambda x: emb(torch.from_numpy(x.numpy())),
    tolist = lambda x: emb(torch.tensor(x.tolist())))

@pytest.mark.parametrize('f', written.values(), ids=written)
def test_no_mix_is_lost_in_silence(f):
    "Mixed rightly or refused: never the row alone under a mixed target"
    try: got = f(ids())
    except TypeError as e:
        assert 'at=' in str(e)
        return
    want = torch.cat([w[:1].expand(n, 1, 5), vectors], 1) if got.shape[1]>t else vectors
    close(got, want)

@pytest.mark.parametrize('f', [lambda x: emb(x.max().reshape(1)), lambda x: torch.bincount(x.flatten())], ids=['max', 'bincount'])
def test_what_has_no_row_is_refused(f):
    with pytest.raises(TypeError, match=r'ids of shape .* were mixed, but .*at=model.embedding'): f(ids())

# models

@pytest.mark.parametrize('p', [0., .5])
def test_embedding_dropout_in_chunks(p):
    "AWD_LSTM's own: one mask for a chunk, drawn before it looks up any row"
    dp = EmbeddingDropout(nn.Embedding.from_pretrained(w, padding_idx=0), p).train()
    x = ids()
    for i in (0, 3):
        real = (x[:,i]!=0).long().sum()
        torch.manual_seed(i)
        got = dp(x[:real,i:i+3])
        torch.manual_seed(i)
        a = dp(own[:real,i:i+3])
        torch.manual_seed(i)
        b = dp(other[:real,i:i+3])
        close(got, l2[:real]*a + (1-l2[:real])*b)

def test_transformer_encoder():
    "Padding masks, token by token: a mixed row is computed as if its padding were not there"
    torch.manual_seed(0)
    enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(5, 1, 8, dropout=0., batch_first=True), 1, enable_nested_tensor=False)
    x = ids()
    got = enc(emb(x), src_key_padding_mask=x==0)
    for i,k in enumerate(equal_lens.tolist()): close(got[i,:k], enc(vectors[i:i+1,:k])[0])

def test_packed_sequences():
    x = ids()
    p = nn.utils.rnn.pack_padded_sequence(emb(x), (x!=0).sum(1), batch_first=True, enforce_sorted=False)
    got,lens = nn.utils.rnn.pad_packed_sequence(p, batch_first=True)
    assert torch.equal(lens, equal_lens)
    close(got, vectors.masked_fill(padded[...,None], 0)[:,:5])

@pytest.mark.parametrize('sparse', [False, True])
def test_gradients(sparse):
    "Each row of the table gets its share from each place where it is used"
    e = nn.Embedding(vocab, 5, sparse=sparse, _weight=w[:vocab].clone())
    e(ids()).pow(2).sum().backward()
    want = torch.zeros(vocab, 5)
    for i in range(n):
        for j in range(t):
            want[own[i,j]] += lam[i]*2*vectors[i,j]
            want[other[i,j]] += (1-lam[i])*2*vectors[i,j]
    close(e.weight.grad.to_dense(), want)

def test_max_norm():
    e = nn.Embedding(vocab, 5, max_norm=.5, _weight=w[:vocab].clone())
    small = w[:vocab]*(.5/w[:vocab].norm(dim=1, keepdim=True)).clamp(max=1)
    close(e(ids()), l2*small[own] + (1-l2)*small[other], 1e-4)

@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiled(backend):
    def f(x): return emb(x).masked_fill((x==0)[...,None], 0).sum(1)
    close(torch.compile(f, backend=backend)(ids()), vectors.masked_fill(padded[...,None], 0).sum(1))

# what leaves the batch

def test_copies_are_mixed(): equal(emb(copy.deepcopy(ids())), vectors)

def test_pickled_without_the_mix():
    got = pickle.loads(pickle.dumps(ids()))
    assert type(got) is torch.Tensor and torch.equal(got, own)

# inputs

def test_structure_is_kept():
    Pair = namedtuple('Pair', 'a b')
    f = torch.randn(n, 3)
    x = dict(z=f, a=(own, [own>0, None]), p=Pair(f, own))
    got = mix_input(x, Mix(partner, lam))
    assert [*got]==['z','a','p'] and type(got['a']) is tuple and type(got['a'][1]) is list and type(got['p']) is Pair
    for o in (got['z'], got['p'].a): close(o, l1*f + (1-l1)*f[partner])
    for o in (got['a'][0], got['p'].b): equal(emb(o), vectors)
    assert torch.equal(got['a'][1][0], ~padded) and got['a'][1][1] is None

def test_ids_under_a_cut_are_selected():
    x = torch.randint(0, vocab, (n,8,8))
    mix = cutmix(1.)(x[:,None].float())
    got = mix_input(x, mix)
    for i in range(n): assert torch.equal(got[i], x[i].where(mix.mask[i,0], x[mix.partner[i]]))

@pytest.mark.parametrize('lens', [[9,7,4,2], [5,5,5,5], [8,8,3,1]])
def test_by_length(lens):
    "For every pairing: the mixed rows come sorted, and each keeps its partner and lam"
    lens = torch.tensor(lens)
    for perm in torch.cartesian_prod(row, row, row, row):
        order,mix = by_length(Mix(perm, lam))
        longest = lens[order].maximum(lens[order][mix.partner])
        assert (longest.diff()<=0).all()
        assert torch.equal(order[mix.partner], perm[order]) and torch.equal(mix.lam, lam[order])

def test_mixed_ids_hold_three_tensors_of_one_shape():
    x = ids()[:,1:3]
    assert type(x) is MixedIds and x.own.shape==x.other.shape==x.lam.shape==(n,2)

# Shares go where the ids go, or there is an error

table = torch.randn(13, 4)

def ragged(rows=3, cols=3):
    "Ids whose shares differ within a row too; as many rows as columns, so that axes can be confused"
    g = torch.Generator().manual_seed(0)
    own,other = (torch.randint(0, 13, (rows,cols), generator=g) for _ in range(2))
    return MixedIds(own, other, torch.rand(rows, cols, generator=g))

def even(rows=3, cols=3):
    x = ragged(rows, cols)
    return MixedIds(x.own, x.other, x.lam[:,:1].expand(rows, cols).contiguous())

def looked_up(x): return torch.lerp(table[x.other], table[x.own], x.lam[...,None])

moved = {
    'flip': lambda x: torch.flip(input=x, dims=(0,)), 'roll': lambda x: torch.roll(input=x, shifts=1, dims=0),
    'index_select': lambda x: torch.index_select(input=x, dim=0, index=torch.tensor([2,0,1])),
    'transpose': lambda x: torch.transpose(input=x, dim0=0, dim1=1), 'permute': lambda x: torch.permute(input=x, dims=(1,0)),
    't': lambda x: torch.t(input=x), 'gather': lambda x: torch.gather(input=x, dim=1, index=torch.tensor([[2,1,0]]*3)),
    'reshape_as': lambda x: x.reshape_as(torch.zeros(9)), 'where': lambda x: torch.where(torch.eye(3)>0, x, x.roll(1, 0)),
    'method where': lambda x: x.where(torch.eye(3)>0, x.roll(1, 1)), 'pad': lambda x: F.pad(x, (1,0))[:,1:], 'copy': copy.copy}

@pytest.mark.parametrize('name', moved)
@pytest.mark.parametrize('make', [ragged, even])
def test_shares_move_with_the_ids(make, name):
    "Vectors of moved ids are moved vectors: each id is looked up by hand, with its own share"
    x = make()
    y = moved[name](x)
    parts = [moved[name](o) for o in (x.own, x.other)] if name not in ('pad',) else [x.own, x.other]
    where = torch.where(torch.eye(3)>0, x.lam, x.lam.roll(1, 0 if name=='where' else 1)) if 'where' in name else None
    lam = x.lam if name=='pad' else where if where is not None else moved[name](x.lam)
    assert_close(table[y], torch.lerp(table[parts[1]], table[parts[0]], lam[...,None]))

@pytest.mark.parametrize('shape', [(3,1,1), (2,1,1)])
def test_several_tables_of_as_many_rows(shape):
    "Hashes: the result has a new first axis, of any size"
    x,h = ragged(),torch.randint(1, 5, shape)
    assert_close(table[(x*h)%13], torch.lerp(table[(x.other*h)%13], table[(x.own*h)%13], x.lam[None,...,None]))

@pytest.mark.parametrize('f,want', [
    (lambda x: torch.stack([table, -table])[0, x], looked_up), (lambda x: table[x, :2], lambda x: looked_up(x)[...,:2]),
    (lambda x: torch.stack([table]*3)[torch.arange(3)[:,None], x], looked_up),
    (lambda x: F.one_hot(x, 13).float().sum(-1), lambda x: torch.ones(3, 3)),
    (lambda x: F.one_hot(x, 13).argmax(-1).float(), lambda x: torch.lerp(x.other.float(), x.own.float(), x.lam)),
    (lambda x: table.index_select(0, x[0]), lambda x: looked_up(x)[0])],
    ids=['head', 'slice', 'rows', 'sum', 'argmax', 'index_select'])
def test_indexed_tables(f, want): assert_close(f(ragged()), want(ragged()))

lost = {
    'behind a slice': lambda x: torch.randn(3, 13)[:, x], 'rows summed': lambda x: x.sum(0), 'H': lambda x: x.H, 'mH': lambda x: x.mH,
    'all summed': lambda x: x.sum(), 'a bag': lambda x: F.embedding_bag(x, table), 'words': lambda x: F.one_hot(x, 13).sum(1),
    'bags by offsets': lambda x: F.embedding_bag(x[:,0], table, offsets=torch.tensor([0,1,1])),
    'added': lambda x: torch.add(x, x.roll(1, 0)), 'written': lambda x: x.clone().__setitem__(0, x[1]),
    'shifted': lambda x: x.clone().__setitem__((slice(None), slice(1, None)), x[:,:-1]),
    'added in place': lambda x: x.clone().add_(x.roll(1, 0)), 'bits': lambda x: x.view(torch.int32)[:,::2],
    'two axes': lambda x: table[x, x.roll(1, 0)%4], 'classes not counted': lambda x: F.one_hot(x),
    'the other axis': lambda x: torch.randn(3, 13).index_select(1, x[0])}

@pytest.mark.parametrize('name', lost)
def test_shares_that_would_get_lost_are_refused(name):
    with pytest.raises((TypeError, RuntimeError), match='ids of shape .* were mixed, but .*name the module to mix at instead'):
        lost[name](ragged())

@pytest.mark.parametrize('f', [lambda x: F.embedding_bag(x, table, mode='sum'), lambda x: F.one_hot(x, 13).sum(1).float()@table,
    lambda x: F.one_hot(x, 13).float().sum(1)@table], ids=['bag', 'counts', 'counted numbers'])
def test_sums_of_a_row_with_one_share(f): assert_close(f(even()), looked_up(even()).sum(1))

def test_ids_of_the_same_share_come_together():
    x = even()
    assert_close(table[(x+x)%13], torch.lerp(table[(2*x.other)%13], table[(2*x.own)%13], x.lam[...,None]))
    y = x.clone()
    y[:,1:] = x[:,:-1]
    assert_close(table[y][:,1:], looked_up(x)[:,:-1])
    y[:,0] = 5
    assert_close(table[y][:,0], table[5].expand(3, 4))

@pytest.mark.parametrize('f', [lambda x: torch.vmap(lambda row: table[row])(x), lambda x: table[torch.tensor(x)],
    lambda x: table[torch.LongTensor(x)], lambda x: F.embedding(Tensor._make_subclass(Tensor, x), table),
    torch.jit.trace(lambda x: F.embedding(x, table), torch.zeros(3, 3, dtype=torch.int64))],
    ids=['vmap', 'copied', 'LongTensor', 'stripped', 'traced'])
@pytest.mark.filterwarnings('ignore:To copy construct')
def test_a_way_around_does_not_pass_in_silence(f):
    with pytest.raises((IndexError, RuntimeError, TypeError, AttributeError)): f(ragged())

# ---- operators

def joined(f):
    "`f` on mixed ids, and the two results of `f` on the ids and their partners, interpolated"
    table,ids = torch.nn.Embedding(160, 4),torch.randint(0, 40, (4, 8))
    mix = Mix(torch.tensor([1,2,3,0]), torch.tensor([.7,.6,.8,.55]))
    lam = mix.lam.view(-1, 1, 1)
    return table(f(mix_input(ids.clone(), mix))), lam*table(f(ids.clone()))+(1-lam)*table(f(ids[mix.partner]))

@pytest.mark.parametrize('op,number', [(operator.imod, 3), (operator.imul, 3), (operator.ifloordiv, 3),
    (operator.iadd, 3), (operator.isub, -3)])
@pytest.mark.parametrize('part', [slice(None), (slice(None), 1), (slice(None), slice(1, 3))], ids=['all', 'column', 'columns'])
def test_operators_in_place_reach_the_ids_behind_a_view(op, number, part):
    def f(x):
        x = x.clone()
        op(x[part], number)
        return x
    torch.testing.assert_close(*joined(f))

def add_to_plain(x):
    base = torch.zeros(4, 9, dtype=torch.long)
    view = base[:,1:]
    view += x

@pytest.mark.parametrize('f', [add_to_plain, lambda x: x >> 1, lambda x: x & 7, lambda x: 50 // x, lambda x: 7 % x, lambda x: x ** 2])
def test_what_an_operator_can_not_do_is_refused_in_our_words(f):
    with pytest.raises(RuntimeError, match='ids of shape .* were mixed, but .*at=model.embedding'): joined(f)

@pytest.mark.parametrize('longer', [torch.lt, torch.Tensor.lt, lambda a, n: a<n, lambda a, n: n>a, lambda a, n: torch.gt(n, a),
    lambda a, n: ~torch.ge(a, n)])
def test_a_mixed_row_is_as_long_as_the_longer(longer):
    "Whichever of the two is asked"
    sizes = mix_input(torch.tensor([6,5,3,2]), Mix(torch.tensor([1,2,3,0]), torch.tensor([.7,.6,.8,.55])))
    assert longer(torch.arange(6), sizes[:,None]).sum(1).tolist()==[6,5,3,6]
