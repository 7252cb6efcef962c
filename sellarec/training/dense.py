"""Dense modules under FSDP2, on a (replicate, shard) mesh, with gradients summed over workers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from sellarec.errors import UserError

MIN_BLOCK_BYTES = 256 << 10
"""A smaller block is gathered with the root: a collective of its own would cost more time than its memory is worth."""


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Shard `model` in place: each block by itself, if it is of any size, then the rest as root.

    Gradients are summed, not averaged: with a loss divided by the global count, any number of workers takes the same
    step. On gloo the divide factor alone fails, so the sum is forced too.

    Frozen weights may be stored in another type than the trained ones, which share one: each is cast to `dtype` as it is
    gathered, and only gradients are reduced together.

    Weights and buffers are worker 0's on all workers, which send them one at a time, so that no other has to have them.

    Args:
        model: on the CPU; a block at a time goes to `device`, where each worker keeps its share. On workers other than 0 its
            weights may be on the device meta.
    """
    first, alone = dist.get_rank() == 0, dist.get_world_size() == 1
    if not alone:
        _share_as_first(model)
    whole = model.state_dict() if first and not alone else {}
    mesh = init_device_mesh(device.type, (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    # vectors of tables stay float32: a model casts them where it needs to
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    large = [block for block in blocks if sum(w.nbytes for w in block.parameters()) >= MIN_BLOCK_BYTES]
    for module in [*large, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in [*large, model]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if alone:
        return
    if not first:
        model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    for buffer in model.buffers():  # those too that aren't saved, as a model's rotary frequencies
        dist.broadcast(buffer, 0)


def _share_as_first(model: nn.Module) -> None:
    """Have modules share the weights, and train those, that they do on worker 0, which alone may have read them: of a model whose
    config ties its output layer to the embeddings the file may have both, and then they aren't tied.

    Raises:
        RuntimeError: there are others than on worker 0.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    names: dict[nn.Parameter, str] = {}
    for name, weight in weights.items():
        names.setdefault(weight, name)  # the first of those that share it
    own = {name: (names[weight], tuple(weight.shape), weight.requires_grad) for name, weight in weights.items()}
    told = [own]
    dist.broadcast_object_list(told, src=0)
    (wanted,) = told
    if {name: shape for name, (_, shape, _) in own.items()} != {name: shape for name, (_, shape, _) in wanted.items()}:
        odd = sorted(
            name for name in {*own, *wanted} if own.get(name, ("", None))[1] != wanted.get(name, ("", None))[1]
        )
        raise RuntimeError(f"worker {dist.get_rank()} has other weights than worker 0, {odd[0]} the first of them")
    for name, (shared_with, _, trains) in wanted.items():
        if own[name][0] != shared_with:
            module, _, leaf = name.rpartition(".")
            weight = weights[shared_with] if shared_with != name else nn.Parameter(torch.empty_like(weights[name]))
            weights[name] = weight
            setattr(model.get_submodule(module), leaf, weight)
        weights[name].requires_grad_(trains)


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Have each block keep its inputs alone for the backward pass, which computes it again. To be called before `shard`.

    It is the block's `forward` that is wrapped, inside the hooks that FSDP2 puts around the call: by the time that it is computed
    again, its weights were gathered for the backward pass. Dropout draws the same again.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Have torch.compile make kernels of each block for computing with gradients; without them it runs as it is. To be called
    before `checkpoint_activations` and `shard`.

    It is the block's `forward` that is compiled, inside the hooks of FSDP2, so that names of weights stay as they are, and the
    kernels find whole weights. A few compilations serve all blocks and all lengths; a block that can't be compiled whole fails,
    instead of running slower than asked for.

    Raises:
        UserError: there is no C++ compiler.
    """
    check_compiler()
    for block in blocks:
        block.forward = partial(
            _with_gradients, torch.compile(block.forward, dynamic=True, fullgraph=True), block.forward
        )


def _with_gradients(compiled: Callable[..., Any], plain: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*arguments, **named)


def check_compiler() -> None:
    """Raises UserError where this machine has no C++ compiler, which torch.compile calls."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "compile is True, but there is no C++ compiler, with which torch.compile makes its kernels: install g++, name a "
            "compiler in the variable CXX, or leave adapt.compile, fuse.compile and pretrain.compile out"
        ) from error


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole, on the CPU of rank 0 (elsewhere an empty dict); tied ones once. All workers call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    # of tied weights, the second name comes too, even where they are frozen
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value for name, value in get_model_state_dict(model, options=options).items() if name in trained}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]
