"""Real processes, on the CPU: what every rank must have in common, what it must not, and what is left when one dies.

The processes run this file: `torchrun --nproc-per-node 2 tests/test_distributed.py FOLDER`."""
import json
import os
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
import pytest
import torch
from fastai.basics import Callback, SGD, params, rank_distrib, set_seed
from fastai.distributed import DistributedDL, parallel_ctx  # noqa: F401 patched onto Learner
from fastcore.script import call_parse, store_true
from common import KINDS, Watch, global_hooks, hooks_on, make_items, make_learner
from tape import close, loaders
from fastai_mixup_ext import Mix, MixCallback, Recipe, mixup

pytest.importorskip('accelerate')
try: from torch.distributed.fsdp import fully_shard
except ImportError: fully_shard = None  # before PyTorch 2.6

root = Path(__file__).parents[1]
launchers = dict(
    accelerate=('accelerate', 'launch', '--multi_gpu', '--main_process_port', '0', '--num_processes'),
    torchrun=('torchrun', '--nproc-per-node'))
epochs,seed = 3,5

# What a process does

class WriteMixes(Callback):
    "Writes each mix down at once, as `[epoch, batch, lam, partner]`"
    order,run_valid = 100,False
    def __init__(self, folder): self.file = folder/f'mixes{rank_distrib()}'
    def after_pred(self):
        mix = self.mix_up.mix
        with self.file.open('a') as f: f.write(json.dumps([self.epoch, self.iter, mix.lam.tolist(), mix.partner.tolist()])+'\n')

class Die(Callback):
    "Kills rank 1 amid an epoch"
    run_valid = False
    def __init__(self, epoch): self.when = epoch,3,1
    def after_pred(self):
        if (self.epoch, self.iter, rank_distrib())==self.when: os.kill(os.getpid(), signal.SIGKILL)

class Ramp(Recipe):
    "The same shares in each of as many parts of a batch as there are processes"
    def __init__(self, parts): self.parts = parts
    def draw(self, batch): return Mix(batch.partner, torch.linspace(.1, .9, len(batch)//self.parts).repeat(self.parts))

def neighbours(x, yb, generator=None, parts=1):
    "Each row's partner is the row before, in the same part of the batch"
    return torch.arange(len(x)).view(parts, -1).roll(1, 1).flatten()

def ramp_learner(kind, items, bs=8, parts=1):
    "A learner that takes `items` in turn and mixes each of `parts` of a batch as a process would"
    set_seed(seed)
    loss_func = torch.nn.MSELoss() if kind=='blended' else torch.nn.CrossEntropyLoss()
    learn = make_learner(kind, dls=loaders(items, bs, shuffle=False, drop_last=False), opt_func=SGD, loss_func=loss_func)
    cb = MixCallback(Ramp(parts), pair=partial(neighbours, parts=parts), at=learn.model[2] if kind=='place' else None)
    return learn.add_cb(cb)

def fit(learn):
    "Losses of the batches, and what the parameters became"
    losses = Watch('before_backward', lambda learn: learn.loss.item())
    learn.fit(2, cbs=losses)
    assert not global_hooks()
    return losses.seen, [getattr(p, 'full_tensor', p.clone)().detach() for p in learn.model.parameters()]

def fit_ddp(kind, n):
    learn = ramp_learner(kind, make_items(kind, n))
    with learn.distrib_ctx(sync_bn=False, cpu=True): res = fit(learn)
    assert not hooks_on(learn.model)
    return res

def fit_fsdp(kind, n):
    learn = ramp_learner(kind, make_items(kind, n))
    for m in learn.model:
        if list(m.parameters()): fully_shard(m)
    fully_shard(learn.model)
    assert not hasattr(learn.model, 'device') and not hasattr(learn.model, 'module')  # which `distrib_ctx` asks for
    learn.dls.loaders = [DistributedDL(dl, device='cpu') for dl in learn.dls.loaders]
    return fit(learn)

CASES = [('ddp', kind, 37) for kind in KINDS] + [('ddp', 'labels', 33)]
if fully_shard: CASES += [('fsdp', kind, 37) for kind in KINDS]

def worker(folder, die, resume, cases):
    sys.path.insert(0, str(root/'examples'))
    import ddp
    learn = ddp.make_learner(folder/'ddp.pth', seed, cbs=[WriteMixes(folder), Die(die)])
    ddp.train(learn, epochs, resume)
    res = dict(digits=params(learn.model), values=learn.recorder.values)
    if cases: res.update({case: globals()[f'fit_{case[0]}'](*case[1:]) for case in CASES})
    torch.save(res, folder/f'result{rank_distrib()}')
    ddp.leave()
    # PyTorch's caches of sharded tensors hold the group, and its threads can abort Python's own end; so that is left out
    sys.stdout.flush()
    os._exit(0)

# What comes of it

def launch(launcher, n, *args):
    "The ended job: nothing that it started holds its output any more"
    command = [Path(sys.executable).with_name(launchers[launcher][0]), *launchers[launcher][1:], str(n), *args]
    return subprocess.run(command, timeout=600, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})

def mixes(folder, rank): return [json.loads(o) for o in (folder/f'mixes{rank}').read_text().splitlines()]
def results(folder, n): return [torch.load(folder/f'result{r}', weights_only=False) for r in range(n)]
def equal(a, b): return len(a)==len(b) and all(map(torch.equal, a, b))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder with the results of a whole run, which is made once"
    @cache
    def run(launcher, n):
        folder = tmp_path_factory.mktemp('whole')
        res = launch(launcher, n, __file__, folder, '--cases')
        assert res.returncode==0, res.stdout
        return folder
    return run

@pytest.fixture(params=[('accelerate', 2), ('torchrun', 3)], ids=lambda o: f'{o[0]}-{o[1]}')
def job(request, whole):
    "A whole run, by either launcher: the number of its processes and the folder of its results"
    return request.param[1],whole(*request.param)

def test_parameters_and_metrics_are_equal_on_all_ranks(job):
    first,*others = results(*reversed(job))
    assert all(equal(first['digits'], o['digits']) and first['values']==o['values'] for o in others)

def test_each_rank_draws_from_the_seed_plus_its_rank(job):
    "And so each draws other mixes, the same ones in every run, no matter how many ranks there are"
    n,folder = job
    drawn = [mixes(folder, rank) for rank in range(n)]
    for rank,steps in enumerate(drawn):
        g = torch.Generator().manual_seed(seed+rank)
        for _,_,lam,partner in steps:
            mix = mixup(.4)(torch.zeros(len(lam), 1), generator=g)
            assert (mix.lam.tolist(), mix.partner.tolist())==(lam, partner)
    assert all(len({str(lam) for _,_,lam,_ in step})==n for step in zip(*drawn))

def test_odd_last_batch(job):
    n,folder = job
    rows = -(-1438//n)  # of 1438 digits
    for rank in range(n): assert [len(lam) for _,_,lam,_ in mixes(folder, rank)]==epochs*([64]*(rows//64) + [rows%64])

@pytest.mark.parametrize('case', CASES, ids=lambda o: '-'.join(map(str, o)))
def test_the_mean_over_ranks_is_what_one_process_computes(job, case):
    "Losses and parameters, on the same mixes: sharded or not, with odd last batches, and with one of a single row"
    n,folder = job
    _,kind,size = case
    items = make_items(kind, size)
    own = -(-size//n)
    items = (items+items)[:own*n]                                                                 # fastai repeats the first
    items = [items[rank*own+i] for start in range(0, own, 8) for rank in range(n) for i in range(start, min(start+8, own))]
    losses,want = fit(ramp_learner(kind, items, 8*n, n))
    ranks = [o[case] for o in results(folder, n)]
    close(torch.tensor([loss for loss,_ in ranks]).mean(0), losses)
    for _,got in ranks:
        assert equal(got, ranks[0][1])
        for a,b in zip(got, want): close(a, b)

def test_a_killed_rank_ends_the_job_and_a_resumed_job_makes_good(whole, tmp_path):
    "Rank 1 is killed in the second epoch; the resumed job begins that epoch again, and ends as if nothing had happened"
    n,folder = 2,whole('accelerate', 2)
    died = launch('torchrun', n, __file__, tmp_path, '--die', '1')
    assert died.returncode and 'Signal 9 (SIGKILL)' in died.stdout and 'rank      : 1' in died.stdout, died.stdout
    assert not list(tmp_path.glob('result*'))
    early = [mixes(tmp_path, rank) for rank in range(n)]
    for o in tmp_path.glob('mixes*'): o.unlink()
    resumed = launch('torchrun', n, __file__, tmp_path, '--resume')
    assert resumed.returncode==0, resumed.stdout
    for rank in range(n):
        whole,late = mixes(folder, rank),mixes(tmp_path, rank)
        assert early[rank]==whole[:len(early[rank])] and early[rank][-1][0]==1
        assert late==[o for o in whole if o[0]>0]
    for a,b in zip(results(folder, n), results(tmp_path, n)): assert equal(a['digits'], b['digits'])

@pytest.mark.parametrize('kind', KINDS)
def test_data_parallel(kind):
    "Without a GPU, DataParallel calls the model itself; it must train as if it were not there"
    learn,want = (ramp_learner(kind, make_items(kind)) for _ in range(2))
    with learn.parallel_ctx(): losses,got = fit(learn)
    assert losses==fit(want)[0] and equal(got, list(want.model.parameters())) and not hooks_on(learn.model)

def test_data_parallel_over_several_devices_refuses_ids():
    learn = ramp_learner('ids', make_items('ids'))
    learn.model = torch.nn.DataParallel(learn.model)
    learn.model.device_ids = [0, 1]
    with pytest.raises(TypeError, match='ids apart from their mix.*distrib_ctx'): learn.fit(1)

@call_parse
def main(
    folder:Path, # Where the processes leave their results
    die:int=-1, # The epoch in which rank 1 is killed
    resume:store_true=False, # Go on from the checkpoint?
    cases:store_true=False # Also train the small learners?
): worker(folder, die, resume, cases)
