"""Devices that are only pretended, so that a CPU shows what `device_map` over several of them would do.

with PretendedDevices() as devices:
    devices.spread(model, {"backbone": "cuda:0", "classifier": "cuda:1"})
    model(**inputs)  # computes on the CPU, but refuses tensors of two devices as GPUs would
"""

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU = torch.device("cpu")


class PretendedDevices(TorchFunctionMode):
    """While it is active, tensors say to be where they were sent, and functions want theirs in one place."""

    def spread(self, model, places):
        """Put parts of a model where `places` says, with Accelerate's hooks; inputs go to the first place."""
        for name, place in places.items():
            owner, _, last = name.rpartition(".")
            part = getattr(model.get_submodule(owner), last)
            tensors = [part] if isinstance(part, torch.Tensor) else [*part.parameters(), *part.buffers()]
            for tensor in tensors:
                tensor.pretended = torch.device(place)
        main = {"": next(iter(places.values()))}
        attach_align_device_hook_on_blocks(model, main | places, dict.fromkeys(places, False))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        if function == torch.Tensor.device.__get__:
            return _device_of(args[0])
        place = _place(function, args, kwargs)
        real_args, real_kwargs = tree_map(lambda x: CPU if _is_device(x) else x, (args, kwargs))
        result = function(*real_args, **real_kwargs)
        moves = function is torch.Tensor.to and place != _device_of(args[0])
        if moves and result is args[0]:
            result = result.view_as(result)  # another tensor, as that on a GPU would be

        def pretend(tensor):
            if moves or not hasattr(tensor, "pretended"):
                tensor.pretended = place
            return tensor

        return tree_map_only(torch.Tensor, pretend, result)


def parts(module, together, name=""):
    """Names of the smallest parts that a device map may tell apart; classes of `together` stay whole."""
    children = {key: child for key, child in module.named_children() if child.state_dict()}
    if type(module).__name__ in together or not children:
        return [name]
    own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    prefix = f"{name}." if name else ""
    below = [parts(child, together, prefix + key) for key, child in children.items()]
    return [prefix + key for key in own] + sum(below, [])


def _place(function, args, kwargs):
    """Where the result lies: where it is asked for, or where all tensors are.

    Numbers and indices on the CPU go with any device, and `copy_` goes between devices.
    """
    leaves = tree_leaves((args, kwargs))
    if asked := [torch.device(x) for x in leaves if _is_device(x)]:
        return asked[0]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if function is torch.Tensor.to and len(tensors) > 1:
        return _device_of(tensors[1])
    is_index = function is torch.Tensor.__getitem__
    there = {
        _device_of(x): None
        for x in (tensors[:1] if function is torch.Tensor.copy_ else tensors)
        if x is tensors[0] or not (_device_of(x) == CPU and (x.ndim == 0 or is_index))
    }
    if len(there) > 1 and tensors[0].ndim == 0 and _device_of(tensors[0]) == CPU:
        del there[CPU]
    if len(there) > 1:
        raise RuntimeError(f"{function.__name__} of tensors on {', '.join(map(str, there))}")
    return next(iter(there), CPU)


def _is_device(x):
    return isinstance(x, torch.device) or isinstance(x, str) and x.startswith("cuda:")


def _device_of(tensor):
    return getattr(tensor, "pretended", CPU)
