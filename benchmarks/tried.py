"""What was tried instead: the winners are in the package, these are the others"""
import torch
import torch.nn.functional as F
from fastai_mixup_ext import blend, cutmix, mixed_loss, mixup
from .measure import name, spread

def by_rows(rows):
    "`rows` rows at a time, so that the partners are still in the cache when they are interpolated: 3 batches from memory instead of 5"
    def f(x, mix, out):
        for a in range(0, len(x), rows):
            part = slice(a, a+rows)
            torch.index_select(x, 0, mix.partner[part], out=out[part]).lerp_(x[part], mix.lam[part].view(-1, *[1]*(x.dim()-1)))
        return out
    return f

def straight(x, mix, out):
    "Each row straight from its partner, 3 batches from memory instead of 5: a call for every row, and partners read on the host"
    for i,p in enumerate(mix.partner.tolist()): torch.lerp(x[p], x[i], mix.lam[i], out=out[i])
    return out

def bag(x, mix):
    "One pass, the rows as embeddings and `lam` as their weights: a value mixed with itself comes out rounded"
    pairs = torch.stack([torch.arange(len(x), device=x.device), mix.partner], 1)
    return F.embedding_bag(pairs, x.flatten(1), per_sample_weights=torch.stack([mix.lam, 1-mix.lam], 1), mode='sum').view_as(x)

def float_mask(x, mix, out):
    "The mask as numbers, and a lerp: vectorised, but inf*0 is nan"
    return torch.index_select(x, 0, mix.partner, out=out).lerp_(x, mix.mask.to(x.dtype))

def bits(x, mix, out):
    "Exact, as the bits of integers, with vector instructions: three passes instead of one"
    keep = mix.mask.to(torch.int32).sub_(1)  # all bits where the partner shows
    own,other = x.view(torch.int32),torch.index_select(x, 0, mix.partner, out=out).view(torch.int32)
    return other.bitwise_xor_(own).bitwise_and_(keep).bitwise_xor_(own)

def slices(x, mix, out):
    "Box by box, by slices: reads the boxes on the host"
    out.copy_(x)
    for i,(p,outside) in enumerate(zip(mix.partner.tolist(), mix.mask[:,0])):
        rows,cols = (~outside).any(1).nonzero(),(~outside).any(0).nonzero()
        if len(rows):
            box = slice(rows[0].item(), rows[-1].item()+1),slice(cols[0].item(), cols[-1].item()+1)
            out[(i, slice(None), *box)] = x[(p, slice(None), *box)]
    return out

def two_losses(pred, y, mix):
    "One log-softmax, two losses: each has a gradient of the prediction's size"
    logp = F.log_softmax(pred, 1)
    return torch.lerp(*(F.nll_loss(logp, t, reduction='none') for t in (y[mix.partner], y)), mix.lam).mean()

class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, labels, share):
        logp = F.log_softmax(pred, 1)
        ctx.save_for_backward(logp, labels, share)
        return -(logp.gather(1, labels)*share).sum()/len(pred)
    @staticmethod
    def backward(ctx, grad):
        logp,labels,share = ctx.saved_tensors
        return logp.exp().mul_(grad/len(logp)).scatter_add_(1, labels, -share*grad/len(logp)), None, None

def fused(pred, y, mix):
    "Its gradient by hand, softmax minus targets: can't be differentiated twice"
    return _Fused.apply(pred, torch.stack([y, y[mix.partner]], 1), torch.stack([mix.lam, 1-mix.lam], 1))

def tried(run):
    "What was tried instead, over what the package does"
    rows = []
    for shape in run.some([(64,3,32,32), (64,3,224,224)]):
        x,y = run.rand(*shape),run.labels(10, shape[0])
        mix,cut,out = mixup()(x, y),cutmix()(x, y),torch.empty_like(x)
        ways = {'mix, 8 rows at a time': (by_rows(8), mix), 'mix, rows without a gather': (straight, mix),
            'cut, mask as numbers': (float_mask, cut), 'cut, as bits': (bits, cut), 'cut, slices': (slices, cut)}
        rows += _over(run, shape, {k:(lambda i, f=f, m=m: f(x, m, out), lambda i, m=m: blend(x, m, out)) for k,(f,m) in ways.items()})
        rows += _over(run, shape, {'fresh memory': (lambda i: blend(x, mix), lambda i: blend(x, mix, out)),
            'fresh memory, embedding bag': (lambda i: bag(x, mix), lambda i: blend(x, mix))})
    for shape in run.some([(64,1000), (64,50000)]):
        pred,y = run.rand(*shape).requires_grad_(),run.labels(shape[1], shape[0])
        mix = mixup()(pred, y)
        def step(f): return lambda i: torch.autograd.grad(f(pred, y, mix), pred)
        def ours(pred, y, mix): return mixed_loss(F.cross_entropy, pred, y, mix)
        ways = {'loss, one log-softmax and two losses': two_losses, 'loss, gradient by hand': fused}
        rows += _over(run, shape, {k:(step(f), step(ours)) for k,f in ways.items()})
    return {'tried': rows}

def _over(run, shape, pairs):
    took = run.time({(k,i):f for k,fs in pairs.items() for i,f in enumerate(fs)})
    return [dict(shape=name(shape), what=k, **spread(took[k,0]/took[k,1], 'time/ours')) for k in pairs]
