"""The public names and signatures are those of api_surface.txt."""
import inspect
import re
from pathlib import Path

import pytest
from fastai.callback.core import event

import fastai_mixup_ext

snapshot = Path(__file__).with_name('api_surface.txt')
public = {o: getattr(fastai_mixup_ext, o) for o in sorted(fastai_mixup_ext.__all__)}
events = {o for o in dir(event) if o[0]!='_'}

def methods(cls):
    "What a user may call on `cls` beyond what fastai and its public bases bring; fastai calls the events"
    bases = [o for o in cls.__mro__[1:] if o in public.values()]
    return {k: v for k,v in inspect.getmembers(cls, inspect.isfunction) if v.__module__.startswith('fastai_mixup_ext') and
            (k=='__call__' or k[0]!='_') and k not in events and not any(k in dir(o) for o in bases)}

def signature(f): return re.sub(r'<function (\w+) at 0x\w+>', r'\1', str(inspect.signature(f)))

def surface():
    for name,o in public.items():
        yield f'{name}{signature(o)}'
        if isinstance(o, type): yield from (f'    .{k}{signature(v)}' for k,v in methods(o).items())

def test_surface_is_announced():
    remedy = "after nbdev-export, run `python tests/test_api_surface.py` and tell the users in CHANGELOG.md"
    assert [*surface()]==snapshot.read_text().splitlines(), f"a public name or signature changed; {remedy}"

@pytest.mark.parametrize('name', public)
def test_public_names_say_what_they_are_and_take(name):
    o = public[name]
    assert o.__doc__
    calls = [o] + [v for k,v in methods(o).items() if k=='__call__'] if isinstance(o, type) else [o]
    assert not [k for f in calls for k,p in inspect.signature(f).parameters.items() if p.annotation is p.empty and k!='self']

if __name__=='__main__':
    snapshot.write_text('\n'.join(surface())+'\n')
    print(f"wrote {snapshot.name}; now CHANGELOG.md")
