"""Compiled transformer blocks: one compilation for all that have the same shapes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lit_edm.errors import InputError

KINDS_OF_BLOCKS = 64
"""Blocks of different widths, image sizes and phases of a run that are compiled before others are left as they are."""


def check_compiler(device: torch.device) -> None:
    """Raises InputError if nothing can be compiled for a device here, which would be found in the first step only."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise InputError(
                "model.init_args.compile is true, but there is no C++ compiler: install g++, or write false"
            ) from error
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InputError("model.init_args.compile is true, but there is no triton: install it, or write false")


def compile_blocks(unet: Any) -> None:
    """Has the transformer blocks of a UNet compiled when they are first run; what they compute stays the same.

    What has been compiled is kept on disk by torch, so that the next run with the same shapes begins sooner.
    """
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, KINDS_OF_BLOCKS)  # of one function, which is all blocks'
    unet.compile_repeated_blocks()


def uncompiled(network: nn.Module) -> AbstractContextManager[Any]:
    """Lets a network run as if nothing in it were compiled, as long as the context is open."""
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
