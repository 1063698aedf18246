"""The front door: turn a dense model into one that also runs on packed patches."""

from __future__ import annotations

from ..backends import check_name
from .adopt import Model, adopt, plan_adoption
from .parity import check_parity

__all__ = ["sparsify"]


def sparsify(model: Model, *, backend: str = "auto", fuse: bool | None = None, verify: bool = False) -> Model:
    """Make ``model`` run on packed patches whenever a grid is bound, and as before when none is.

    Modules that look at one pixel stay. Spatial ones, and those that reduce over an image, change their class in
    place: Parameters, buffers, hooks, state-dict keys and ``isinstance`` answers remain. The whole tree is
    checked before anything changes, so a refused model is left untouched.

    ``forward`` methods of containers are searched for functional calls that could mix patches (a mean over
    the image, pooling, padding, attention). Such a call is refused, unless ``verify`` shows it to be
    harmless. A module class of your own that treats each pixel by itself may say so: ``patchsparse_pointwise = True``.

    Args:
        model: any module; no part of it may be sparsified already.
        backend: engine of the spatial modules, see :func:`patchsparse.explain`.
        fuse: whether a batch norm, the shortcut that a block adds to it and the activation after it run as one
            operator (`patch_batch_norm_act`) while a grid is bound. It has first derivatives only. None does it where
            an engine is faster that way. Modules that a hook listens to are called one by one all the same.
        verify: take one training step, forward and backward, of a small random input through copies of the model in
            float64, packed by the ``gather`` engine and as dense-and-mask; compare the output of every module and the
            gradient of every parameter and of the input. :func:`patchsparse.testing.check_parity` does it for other
            sizes. Your model, its gradients and statistics, and the random state stay as they are.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModuleError: naming the module, the reason and a remedy.
        ValueError: if ``backend`` is unknown, part of the model is sparsified, or ``verify`` could not run it.
            A model that ``verify`` cannot train is an UnsupportedModuleError, also if the dense model cannot be.
    """
    if backend != "auto":
        check_name(backend)
    plan = plan_adoption(model, trust_forward=verify)
    if verify:
        check_parity(model, fuse=fuse)
    return adopt(model, plan, backend, fuse)
