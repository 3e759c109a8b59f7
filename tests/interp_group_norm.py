"""The Triton kernels of kernels/group_norm.py in Triton's interpreter, on the CPU, against float64.

Run with TRITON_INTERPRET=1 (test_group_norm.py does). Inputs lie in a moat of NaN: a read outside
them spoils the answer. Outputs and work space start as NaN in such a moat, too: a value not
written, or one written outside, is seen.
"""
import sys
import warnings
from pathlib import Path

import torch
import torch.utils.checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import group_norm as module  # noqa: E402
from test_group_norm import (  # noqa: E402
    assert_no_worse, closed_form, eager, gradients, inputs)

MOAT = 64
held = []  # (whole buffer, what lies in its middle) of all tensors that the module made


def moated(shape, stride, dtype):
    """A tensor of NaN in the middle of a buffer of NaN."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else 0
    buffer = torch.full((size + 2 * MOAT,), float("nan"), dtype=dtype)
    return buffer, buffer.as_strided(shape, stride, MOAT)


def in_moat(v):
    return v if v is None else moated(v.shape, v.stride(), v.dtype)[1].copy_(v)


class Allocator:
    """torch, as the module sees it: what it allocates lies in a moat, and is held."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, dtype=None, device=None):
        like = torch.empty(shape, dtype=dtype)
        held.append(moated(like.shape, like.stride(), like.dtype))
        return held[-1][1]

    def empty_like(self, v):
        held.append(moated(v.shape, v.stride(), v.dtype))
        return held[-1][1]


def kernels(x, groups, weight, bias, scale, shift, silu=True, eps=1e-5):
    """group_norm as on a GPU: past the dispatch."""
    return module._eager(x, weight, bias, scale, shift, groups, silu, eps)


def guarded(*case, **options):
    """`gradients` of the kernels with every input in a moat, and all moats looked at."""
    def function(x, groups, *others, **options):
        x, *others = (v if v is None else in_moat(v.detach()).requires_grad_()
                      for v in (x, *others))
        made.extend((x, *others))
        return kernels(x, groups, *others, **options)

    *tensors, dy, groups = case
    made = []
    held.clear()
    y = function(tensors[0], groups, *tensors[1:], **options)
    grads = torch.autograd.grad(y, [v for v in made if v is not None], in_moat(dy))
    for buffer, inside in held:
        assert buffer[:MOAT].isnan().all() and buffer[-MOAT:].isnan().all(), "written outside"
        assert not inside.isnan().any(), "not written, or a NaN from outside"
    assert y.stride() == tensors[0].stride() == grads[0].stride() or 1 in y.shape
    return [v.double() for v in (y, *grads)]


def main():
    module.torch = Allocator()
    last, last_3d = torch.channels_last, torch.channels_last_3d
    tried, together, loops = 0, set(), set()
    # One tile a group; then TILE and CHUNK so small that the same shapes are split, along both
    # sides; then one tile a group that the backward kernel takes in steps.
    for module.TILE, module.CHUNK, module.STEP in (
            (16384, 8192, 2048), (64, 64, 64), (16384, 16, 64)):
        for shape, groups, layout in (
                ((3, 12, 5, 7), 4, None), ((2, 12, 5, 7), 4, last), ((2, 8, 2, 2), 8, last),
                ((2, 10, 3, 3), 1, None), ((1, 70, 3, 3), 1, last), ((3, 150), 2, None),
                ((1, 6, 45), 2, None), ((1, 7, 2, 3, 2), 7, last_3d), ((1, 64, 2, 2), 2, None),
                ((131, 2, 2, 2), 1, None), ((3, 32, 5, 7), 8, last),
                # the last two: groups share tiles
                ((65, 16, 3, 2), 8, last), ((3, 16, 3, 5), 16, last)):
            for dtype, adaptive, silu in ((torch.float32, True, True), (torch.bfloat16, True, True),
                                          (torch.float16, False, False)):
                if dtype != torch.float32 and shape[0] != 3:
                    continue
                case = (*inputs(shape, dtype, adaptive, layout=layout or torch.contiguous_format),
                        groups)
                tiles, _, chunks, _ = module._tiles(case[0], groups, 8)
                together.add(tiles["BG"])
                steps = (module._in_steps(tiles, case[0].element_size())["LOOPS"] if chunks == 1
                         else 1)
                loops.add((tiles["LAST"], min(tiles["BG"], 2), min(steps, 3)))
                if steps == 1 and module.CHUNK == 16:
                    continue  # as the first time
                exact = gradients(closed_form, *case, dtype=torch.float64, silu=silu)
                # the interpreter cuts bf16 off instead of rounding: twice the error
                assert_no_worse(
                    guarded(*case, silu=silu), gradients(eager, *case, silu=silu), exact, dtype,
                    factor=3 if dtype == torch.bfloat16 else 2)
                tried += 1
        # the other half of the chunk is NaN and must not be read
        for s, t in ((True, False), (False, True)):
            x, weight, bias, scale, shift, dy = inputs((2, 6, 3, 3))
            case = (x, weight, bias, scale if s else None, shift if t else None, dy, 3)
            exact = gradients(closed_form, *case, dtype=torch.float64)
            assert_no_worse(guarded(*case), gradients(eager, *case), exact, torch.float32)
            tried += 1
        # mean / std = 1000: centred statistics are good to x's rounding, 6e-5
        for adaptive in (True, False):
            x, *rest = inputs((2, 8, 5, 9), adaptive=adaptive, std=1)
            case = (x + 1000, *rest, 2)
            for a, c in zip(guarded(*case), gradients(closed_form, *case, dtype=torch.float64)):
                assert (a - c).abs().max() <= 2e-4 * c.abs().max()
            tried += 1

    # Twice, and through torch.func: a differentiated gradient is the twin's
    given = [v if v is None else v.requires_grad_() for v in inputs((2, 6, 3, 3))[:5]]
    found = []
    for function in (kernels, module.group_norm_torch):
        grads = torch.autograd.grad(function(given[0], 3, *given[1:]).sin().sum(), given,
                                    create_graph=True)
        found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), given)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    x = given[0].detach()
    dx = torch.func.grad(lambda x: kernels(x, 3, *given[1:]).sin().sum())(x)
    torch.testing.assert_close(dx, found[1][0])
    # Nothing to differentiate: the launches alone, the same y. Forward mode: refused, not answered
    # with no tangent
    y = kernels(given[0], 3, *given[1:])
    with torch.no_grad():
        assert torch.equal(kernels(given[0], 3, *given[1:]), y)
    assert y.grad_fn is not None and kernels(x, 3, *(v.detach() for v in given[1:])).grad_fn is None
    assert all(kernels(x, 3, *(v if v is one else v.detach() for v in given[1:])).requires_grad
               for one in given[1:])
    with torch.autograd.forward_ad.dual_level():
        try:
            kernels(torch.autograd.forward_ad.make_dual(x, x), 3, *(v.detach() for v in given[1:]))
        except (RuntimeError, NotImplementedError) as refused:
            assert "jvp" in str(refused) or "forward" in str(refused), refused
        else:
            raise AssertionError("forward mode without a tangent")
    # As an operator: PyTorch's own checks of it, in one graph, checkpointed
    module.torch = torch
    with warnings.catch_warnings(action="ignore"):
        for case in ((given, 3), (inputs((2, 6, 3, 3), adaptive=False, layout=last)[:5], 2)):
            x, *others = (v if v is None else v.detach().requires_grad_() for v in case[0])
            torch.library.opcheck(module.group_norm_op, (x, *others, case[1], True, 1e-5))
            y, stats = (v.detach() for v in module.group_norm_op(x, *others, case[1], True, 1e-5))
            plain = [v if v is None else v.detach() for v in (x, *others)]
            torch.library.opcheck(module.group_norm_backward_op,
                                  (torch.ones_like(y), *plain, stats, case[1], True))
            call = lambda x: module.group_norm_op(  # noqa: E731
                2 * x, *others, case[1], True, 1e-5)[0].sin()
            expected = torch.autograd.grad(
                module.group_norm_torch(2 * x, case[1], *others).sin().sum(), x)
            for way in (torch.compile(call, fullgraph=True, backend="aot_eager"),
                        lambda x: torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)):
                torch.testing.assert_close(torch.autograd.grad(way(x).sum(), x), expected,
                                           rtol=1e-4, atol=1e-5)
            tried += 1
    # Same bits again
    again = [torch.autograd.grad(kernels(given[0], 3, *given[1:]).sum(), given) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again))
    assert together == {1, 2, 4, 8, 16}, together
    # Steps were taken in both layouts, of one group and of several, two and more.
    assert {(False, 1, 3), (True, 1, 3), (True, 2, 2), (True, 2, 3)} <= loops, loops
    print(f"{tried} cases right")


if __name__ == "__main__":
    main()
