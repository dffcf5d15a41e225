"""A GPU that is not there: tensors that say they lie on cuda:0 and compute on the CPU.

    with gpu() as seen:
        model.to('cuda')(x.to('cuda'))      # as on a GPU: mixed devices and .numpy() are refused
    seen.waits                              # how often the host would wait for the GPU, by kind

For C++ these tensors lie on the CPU, so autograd and optimizers work; only Python is told otherwise.
Mixed precision follows the CPU's list of operators. Kernels of CUDA, their speed and last bits are not seen.
"""

import collections
import contextlib

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device('cuda', 0)
REFUSAL = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
MAY_INDEX = 'index', '_unsafe_index', 'index_put', 'index_put_', '_index_put_impl_'  # CUDA takes indices of the CPU
WAITS = 'nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount', '_linalg_eigh'
WAITS += '_local_scalar_dense', 'equal', 'is_nonzero', 'nms'


class MixedDevices(RuntimeError):
    "What CUDA says of an operator with tensors of both devices."


class Gpu(torch.Tensor):
    "A tensor on the GPU that is not there; `elem` holds it."

    @staticmethod
    def __new__(cls, elem):
        form = dict(strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype)
        made = torch.Tensor._make_wrapper_subclass(cls, elem.size(), **form)
        made.elem = elem.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _now.compute(func, args, kwargs or {})

    def __repr__(self):
        return f'Gpu({self.elem!r})'

    def __deepcopy__(self, memo):
        return Gpu(self.elem.clone()).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        return Gpu, (self.elem,)

    def numpy(self, *args, **kwargs):
        raise TypeError(REFUSAL)

    def __array__(self, *args, **kwargs):
        raise TypeError(REFUSAL)

    def cpu(self):
        return self.to('cpu')

    def cuda(self):
        return self

    def new_tensor(self, data, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA)


def _reader(name):
    "A method that brings values to the host."

    def read(self, *args):
        _now.waits[name] += 1
        return getattr(self.elem, name)(*args)

    return read


for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__'):
    setattr(Gpu, name, _reader(name))


def is_gpu(device):
    return device is not None and torch.device(device).type == 'cuda'


def _unwrap(x):
    return tree_map(lambda t: t.elem if isinstance(t, Gpu) else t, x)


def _wrap(x):
    return tree_map(lambda t: Gpu(t) if isinstance(t, torch.Tensor) and not isinstance(t, Gpu) else t, x)


def _is_backward():
    return torch._C._current_graph_task_id() != -1


class Seen(TorchDispatchMode):
    "Computes every operator on the CPU; refuses mixed devices, counts waits and launches."

    def __init__(self):
        super().__init__()
        self.waits, self.launches = collections.Counter(), 0

    @property
    def n_waits(self):
        return sum(self.waits.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args, kwargs):
        name = func._schema.name.split('::')[-1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = any(isinstance(t, Gpu) for t in tensors)
        asked = kwargs.get('device')
        of_argument = name == '_to_copy' or name.startswith('new_') or name.endswith('_like') or _is_backward()
        there = here if asked is None or of_argument else is_gpu(asked)  # there C++ names the device that it knows
        if here and name != 'copy_':
            self.check(func, name, args, tensors)
        self.count(name, args, tensors, here, there)
        if is_gpu(asked):
            kwargs = dict(kwargs, device='cpu')
        out = func(*_unwrap(args), **_unwrap(kwargs))
        given = [
            (s, kwargs.get(s.name, args[i] if i < len(args) else None)) for i, s in enumerate(func._schema.arguments)
        ]
        written = [a for s, a in given if s.alias_info and s.alias_info.is_write]
        if any(r.alias_info and r.alias_info.is_write for r in func._schema.returns):
            return written[0] if len(written) == 1 else tuple(written)
        return _wrap(out) if there else out

    def check(self, func, name, args, tensors):
        "A number in a tensor without dimensions may lie anywhere, and so may indices of a tensor on the GPU."
        others = [t for t in tensors if not isinstance(t, Gpu) and t.dim()]
        if name in MAY_INDEX and isinstance(args[0], Gpu):
            values = args[2:3] if 'put' in name else []
            self.waits['index of the CPU'] += len(others)
            others = [t for t in values if t.dim() and not isinstance(t, Gpu)]
        if others and not _is_backward():
            shapes = [list(t.shape) for t in others]
            raise MixedDevices(f'{func}: expected all tensors on one device, but these lie on the CPU: {shapes}')

    def count(self, name, args, tensors, here, there):
        self.launches += here or there
        masks = [t for t in tensors[1:] if t.dtype == torch.bool] if name in MAY_INDEX else []
        if name == 'copy_':
            self.waits['copy'] += isinstance(args[0], Gpu) != isinstance(args[1], Gpu)
        elif here and (name in WAITS or masks or name == 'repeat_interleave'):
            self.waits[name] += 1


class Generator(torch.Generator):
    "A generator of the CPU that says where it is meant to be."

    def __new__(cls, device='cpu'):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


def _moved(x, dtype):
    "A copy on the other device."
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError('a copy between devices that carries a gradient')
    _now.waits['copy'] += 1
    copied = (x.elem if isinstance(x, Gpu) else x.detach()).to(dtype or x.dtype, copy=True)
    return copied if isinstance(x, Gpu) else Gpu(copied)


def _to(plain):
    "`Tensor.to`, which must not look at the device that C++ knows."

    def to(self, *args, **kwargs):
        kwargs = dict(kwargs)
        args = list(args)
        if args and isinstance(args[0], torch.Tensor):
            other = args.pop(0)
            args = [other.device, other.dtype, *args]
        for a in args:
            if isinstance(a, torch.dtype):
                kwargs['dtype'] = a
            elif isinstance(a, (str, torch.device)):
                kwargs['device'] = a
        device = kwargs.pop('device', None)
        if device is not None and is_gpu(device) != isinstance(self, Gpu):
            return _moved(self, kwargs.get('dtype'))
        return plain(self, **kwargs) if kwargs.keys() - {'non_blocking'} else self

    return to


def _from_data(plain):
    "`torch.tensor` and `torch.as_tensor`: a copy to the GPU, if it is meant to be there."

    def make(data, *, dtype=None, device=None, **kwargs):
        made = plain(data, dtype=dtype, **kwargs)
        return made.to(device) if device is not None else made

    return make


def _module_to(plain):
    "`Module.to` would give a parameter the storage of its copy, and a `Gpu` has none."

    def to(self, *args, **kwargs):
        devices = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device))]
        if any(map(is_gpu, devices)):
            return on(self)
        return _move(self, _unwrap) if devices else plain(self, *args, **kwargs)

    return to


def _random(plain):
    "A random tensor, whose generator must lie where it is made."

    def make(*args, generator=None, device=None, **kwargs):
        place = generator.device.type if generator is not None else None
        if place not in (None, 'cuda' if is_gpu(device) else 'cpu'):
            raise MixedDevices(f'{plain.__name__}: a generator of {place} for a tensor of {device}')
        return plain(*args, generator=generator, device=device, **kwargs)

    return make


def _enter(plain):
    "Inference mode knows no subclasses; without gradients the same operators run."

    def enter(self):
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    return enter


def _exit(plain):
    return lambda self, *error: torch.set_grad_enabled(self.before)


def _autocast(plain):
    return lambda device_type, *args, **kwargs: plain('cpu', *args, **kwargs)


PATCHES = [
    (torch.cuda, 'is_available', lambda plain: lambda: True),
    (torch.cuda, 'device_count', lambda plain: lambda: 1),
    (torch.cuda, 'current_device', lambda plain: lambda: 0),
    (torch.cuda, 'get_device_capability', lambda plain: lambda device=None: (9, 0)),
    (torch.cuda, 'mem_get_info', lambda plain: lambda device=None: (2**34, 2**35)),
    (torch.cuda, '_lazy_init', lambda plain: lambda: None),
    (torch.cuda, 'get_rng_state', lambda plain: lambda device=None: None),
    (torch.cuda, 'set_rng_state', lambda plain: lambda state, device=None: None),
    (torch.cuda, 'manual_seed_all', lambda plain: lambda seed: None),
    (torch.cuda, 'is_current_stream_capturing', lambda plain: lambda: False),
    (torch, 'Generator', lambda plain: Generator),
    (torch, 'autocast', _autocast),
    (torch.inference_mode, '__enter__', _enter),
    (torch.inference_mode, '__exit__', _exit),
    *((torch, name, _random) for name in ('rand', 'randn', 'randperm')),
    (torch, 'tensor', _from_data),
    (torch, 'as_tensor', _from_data),
    (torch.Tensor, 'to', _to),
    (torch.nn.Module, 'to', _module_to),
    (torch.nn.Module, 'cpu', lambda plain: lambda self: _move(self, _unwrap)),
    (F, 'one_hot', lambda plain: lambda x, n=-1: Gpu(plain(x.elem, n)) if isinstance(x, Gpu) else plain(x, n)),
]
_now = None


@contextlib.contextmanager
def gpu():
    "Within it 'cuda' is there."
    global _now
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in PATCHES]
    for owner, name, make in PATCHES:
        setattr(owner, name, make(getattr(owner, name)))
    _now = Seen()
    try:
        with _now:
            yield _now
    finally:
        _now = None
        for owner, name, plain in kept:
            setattr(owner, name, plain)


def _move(module, convert):
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(convert(p.detach()), requires_grad=p.requires_grad)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = convert(b)
    return module


def on(x):
    "A module, or tensors in a nest of lists and dicts, on the GPU."
    return _move(x, _wrap) if isinstance(x, torch.nn.Module) else _wrap(x)
