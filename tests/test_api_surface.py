"""The public names and signatures are those of api_surface.txt. Whoever changes them says so there, by `python tests/test_api_surface.py`,
and in CHANGELOG.md."""
import inspect
import re
from pathlib import Path

import pytest

import fastai_mixup_ext

snapshot = Path(__file__).with_name('api_surface.txt')
public = {o: getattr(fastai_mixup_ext, o) for o in sorted(fastai_mixup_ext.__all__)}

def methods(cls):
    "What `cls` and those of its bases that are ours define in public"
    ours = [o for o in cls.__mro__ if o.__module__.startswith('fastai_mixup_ext.')]
    return {k: v for o in reversed(ours) for k,v in vars(o).items() if inspect.isfunction(v) and (k=='__call__' or k[0]!='_')}

def signature(f): return re.sub(r'<function (\w+) at 0x\w+>', r'\1', str(inspect.signature(f)))

def surface():
    for name,o in public.items():
        yield f'{name}{signature(o)}'
        if isinstance(o, type): yield from (f'    {name}.{k}{signature(v)}' for k,v in sorted(methods(o).items()))

def test_surface_is_announced(): assert [*surface()]==snapshot.read_text().splitlines()

@pytest.mark.parametrize('name', public)
def test_public_names_say_what_they_are_and_take(name):
    o = public[name]
    assert o.__doc__
    for f in [o, o.__call__] if isinstance(o, type) and '__call__' in methods(o) else [o]:
        sig = inspect.signature(f)
        untyped = [k for k,p in sig.parameters.items() if p.annotation is p.empty and k!='self']
        assert not untyped, f'{name}{sig}'

if __name__=='__main__': snapshot.write_text('\n'.join(surface())+'\n')
