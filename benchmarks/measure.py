"""How everything here is measured: alternately, so that each figure is a ratio within one run"""
import os, platform, subprocess, sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, process_time, strftime
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

def clock(
    f:Callable, # Called as `f(i)` with the numbers of `calls`, so that it can rotate its inputs
    calls:range,
    device:str
)->float: # Seconds per call
    "Time calls of `f`: by CUDA's events, by the wall clock, or with one CPU thread by processor time, which other programs don't enter"
    if device=='cpu':
        now = process_time if torch.get_num_threads()==1 else perf_counter
        start = now()
        for i in calls: f(i)
        return (now()-start)/len(calls)
    start,end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in calls: f(i)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)/1000/len(calls)

def alternate(
    fs:dict, # Name -> function of the number of the call
    rounds:int, # How many figures for each
    device:str='cpu',
    least:float=.002, # Seconds that a figure is to be taken over; 0: one call
    warm:int=2, # Rounds that are dropped
    settle:bool=False # Call each once more, untimed, before it is timed: what the one before left in caches and allocator is not its own
)->dict: # Name -> array of `rounds` seconds per call
    "Time `fs` in turn, A B C A B C ..., so that what slows the machine down for a while slows all of them"
    many = {k:1 + int(least/max(min(clock(f, range(1), device) for _ in range(3)), 1e-7)) if least else 1 for k,f in fs.items()}
    took = {k:[] for k in fs}
    for r in range(warm+rounds):
        for k,f in fs.items():
            if settle: f(r*many[k])
            took[k].append(clock(f, range(r*many[k], (r+1)*many[k]), device))
    return {k:np.array(v[warm:]) for k,v in took.items()}

@contextmanager
def busy(
    programs:int # How many
):
    "With other programs beside us that copy memory all the time"
    copies = 'import torch; torch.set_num_threads(1); x = torch.rand(2**22)\nwhile True: x = x.clone()'
    beside = [subprocess.Popen([sys.executable, '-c', copies]) for _ in range(programs)]
    try: yield beside
    finally:
        for o in beside:
            o.kill()
            o.wait()

def spread(
    values, # One per round
    name:str='ratio'
)->dict:
    "Median and quartiles"
    low,mid,high = np.percentile(values, (25,50,75))
    return {name:float(mid), 'low':float(low), 'high':float(high)}

def name(shape): return '×'.join(map(str, shape))

def slope(sizes, seconds)->float:
    "Of the straight line through the points on log-log axes: 1 is linear growth"
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])

def peak_bytes(f:Callable, device:str='cpu')->int:
    "The most memory that tensors made by `f` take up at a time"
    if device!='cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated()-before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    events = [e for e in prof.profiler.kineto_results.events() if e.name()=='[memory]']
    changes = sorted((e.start_ns() if hasattr(e, 'start_ns') else e.start_us(), e.nbytes()) for e in events)
    return int(np.cumsum([0]+[n for _,n in changes]).max())

class Traffic(TorchDispatchMode):
    "Counts the bytes that operators read and write, each operand once per operator"
    overwrites = {'copy_', 'fill_', 'zero_', 'index_copy_'}  # in-place, but what was there is not read

    def __init__(self): self.bytes = 0; super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        res = func(*args, **kwargs)
        schema,name = func._schema,func._schema.name.split('::')[1]
        if name.startswith(('empty', 'new_empty', 'set_')): return res
        writes = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if not writes and any(r.alias_info for r in schema.returns): return res  # a view
        given = {**dict(zip([a.name for a in schema.arguments], args)), **kwargs}
        unread = {a.name for a in schema.arguments if a.is_out} | (set(writes) if name in self.overwrites else set())
        reads = [v for k,v in given.items() if k not in unread]
        for t in tree_leaves((reads, res)): self.bytes += _span(t) if isinstance(t, Tensor) else 0
        return res

def _span(t):
    "Bytes of the distinct elements of `t`: an expanded tensor is read once"
    return int(np.prod([n for n,s in zip(t.shape, t.stride()) if s], dtype=np.int64))*t.element_size()

def traffic(f:Callable)->int:
    "Bytes read and written by the operators of `f`"
    with Traffic() as t: f()
    return t.bytes

def _version(name):
    try: return version(name)
    except PackageNotFoundError: return None

def about(device:str)->dict:
    "Versions, threads and device, and how busy the machine is with other things"
    cpu = next((o.split(':')[1].strip() for o in _cpuinfo() if o.startswith('model name')), platform.processor())
    used = 'events' if device!='cpu' else 'wall' if torch.get_num_threads()>1 else 'processor time'
    return dict(date=strftime('%Y-%m-%d'), device=torch.cuda.get_device_name() if device!='cpu' else cpu, cores=os.cpu_count(),
        threads=torch.get_num_threads(), clock=used, load=round(os.getloadavg()[0], 2), python=platform.python_version(),
        **{o:_version(o) for o in ('torch', 'fastai', 'torchvision', 'timm', 'kornia')})

def _cpuinfo():
    try:
        with open('/proc/cpuinfo') as f: return f.readlines()
    except OSError: return []
