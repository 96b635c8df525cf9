"""One declaration per op.

An op is declared once, as an annotated function whose body launches its Triton kernels. `op` makes
everything else from this function and a torch function with the same parameters::

    @op(torch=_torch.evict, writes=("slots.key", ...), check=_check)
    def evict(
        slots: Annotated[Slots, Uses("key", ...)],
        t: Annotated[Tensor, Shape("batch", INT32)],
        *,
        buffer: int,
        impl: str = "auto",
    ) -> None:
        _evict_kernel[grid](...)

- The launcher is registered with `torch.library` under the schema that its annotations give, so
  `torch.compile` sees one opaque op and knows which tensors it writes to.
- ``evict(...)`` checks the arguments, chooses between the backends and runs one of them.
- ``evict.unchecked(...)`` runs a backend without checks.
- With ``grad`` both backends are registered, and both are differentiable.

``slots`` of type `Slots`, or ``pages`` of type `Pages`, stands in the schema for those of its
tensors that the op uses. ``rope`` and ``decay`` stand for all of theirs, and may be None.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from trimkv_kernels.kernels.checks import Shape, Sizes, check_choice
from trimkv_kernels.kernels.launch import is_interpreted
from trimkv_kernels.kernels.pages import Pages
from trimkv_kernels.kernels.prologue import Decay, Rope
from trimkv_kernels.kernels.slots import Slots

IMPLS = ("auto", "triton", "torch")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
# Types that stand for several tensors, and what is known about each tensor.
_HOLDERS: dict[Any, dict[str, Any]] = {
    holder: get_type_hints(holder, include_extras=True) for holder in (Slots, Pages, Rope, Decay)
}
_OPTIONAL = {holder | None: holder for holder in (Rope, Decay)}
# Sizes of dimensions are taken from these first. The first of them decides dtype and device.
_LEADERS = ("query", "slots", "pages", "key")

P = ParamSpec("P")
R = TypeVar("R")


def resolve_impl(impl: str, device: torch.device) -> str:
    """Turn ``impl`` into ``"triton"`` or ``"torch"`` for tensors on ``device``.

    Args:
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``. If an
            explicit choice cannot run, it raises.
        device: Where the tensors are. ROCm devices have type ``"cuda"`` too.

    Raises:
        ValueError: ``impl`` is not one of the three.
        RuntimeError: Triton was asked for and is not installed, or the tensors are not on a GPU and
            Triton is not interpreted.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return "torch"
    if not _HAS_TRITON:
        raise RuntimeError(
            f"impl={impl!r} runs on Triton here, and Triton is not installed; "
            "install it (pip install triton) or pass impl='torch'"
        )
    if device.type != "cuda" and not is_interpreted():
        raise RuntimeError(
            f"impl='triton' needs tensors on a GPU, got {device.type}; pass impl='torch', "
            "or set TRITON_INTERPRET=1 before the first import to interpret the kernels"
        )
    return "triton"


class Uses:
    """Which tensors of its slots or pages an op uses, to be written into their annotation."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class _Part:
    """One argument of the schema: an argument of the op, or a tensor of its ``holder``."""

    argument: str
    tensor: str | None
    holder: Any
    hint: Any
    shape: Shape | None

    @property
    def name(self) -> str:
        return self.argument if self.tensor is None else f"{self.argument}_{self.tensor}"

    def of(self, arguments: dict[str, Any]) -> Any:
        found = arguments[self.argument]
        if self.tensor is None or found is None:
            return found
        return getattr(found, self.tensor)

    def tensors(self, arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """The tensors to check, each with its name in error messages."""
        name, found = self.tensor or self.argument, self.of(arguments)
        if isinstance(found, Tensor):
            return [(name, found)]
        return [] if found is None else [(f"{name}[{i}]", x) for i, x in enumerate(found)]


@dataclass(frozen=True)
class Grad:
    """How an op is differentiated, once.

    Attributes:
        run: Called as ``run(inputs, outputs, grads, needed, impl)``. ``inputs`` are the op's, in
            the order of its declaration. ``needed`` says which of them need a gradient. Returns
            the gradient of every input, or None.
        saves_outputs: Whether ``run`` needs the outputs. If not, they are None.
    """

    run: Callable[..., Sequence[Tensor | None]]
    saves_outputs: bool = True


class Op(Generic[P, R]):
    """An op of this package; see the module.

    Attributes:
        launch: The declared function: launches the Triton kernels, checks nothing.
        registered: The `torch.library` op of each backend that has one.
    """

    __name__: str

    def __init__(
        self,
        launch: Callable[P, R],
        torch_function: Callable[..., R],
        *,
        writes: Sequence[str],
        check: Callable[..., None] | None,
        fake: Callable[..., Any] | None,
        grad: Grad | None,
    ) -> None:
        functools.update_wrapper(self, launch)
        self.launch = launch
        parameters = dict(inspect.signature(launch).parameters)
        del parameters["impl"]
        self._names = tuple(parameters)
        self._positional = tuple(
            name for name, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD
        )
        self._defaults = {
            name: x.default for name, x in parameters.items() if x.default is not x.empty
        }
        hints = get_type_hints(launch, include_extras=True)
        self._result = None if hints["return"] is type(None) else hints["return"]
        self._parts = [part for name in self._names for part in _parts(name, hints[name])]
        self._checked = [(part, part.shape) for part in self._parts if part.shape is not None]
        leaders = [x for name in _LEADERS for x in self._checked if x[0].argument == name]
        self._binding = leaders + [x for x in self._checked if x not in leaders]
        self._binding_by_index = [
            (part, shape.by_index() if part.holder is Slots else shape)
            for part, shape in self._binding
        ]
        self._check, self._fake, self._grad = check, fake, grad
        self._writes = {name.replace(".", "_") for name in writes}
        self.registered = {"triton": self._register(self.__name__, launch, "triton")}
        self._torch: Callable[..., R] = torch_function
        if grad is not None:
            name = f"{self.__name__}_torch"
            self.registered["torch"] = self._register(name, torch_function, "torch")
            self._torch = functools.partial(self._run_registered, "torch")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        impl = str(kwargs.pop("impl", "auto"))
        arguments = self._bind(args, kwargs)
        device = self._check_tensors(arguments)
        if resolve_impl(impl, device) == "torch":
            return self._torch(**arguments)
        return self._run_registered("triton", **arguments)

    def unchecked(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run without checks, for a caller that has checked. Checks take a tenth of a step.

        Takes the op's arguments; ``impl`` must be ``"torch"`` or ``"triton"``.
        """
        if kwargs.pop("impl") == "torch":
            return self._torch(*args, **kwargs)
        return self._run_registered("triton", *args, **kwargs)

    def flat(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The arguments as the registered op takes them."""
        arguments = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        return tuple(part.of(arguments) for part in self._parts)

    def _run_registered(self, impl: str, *args: Any, **kwargs: Any) -> R:
        result: R = self.registered[impl](*self.flat(*args, **kwargs))
        return result

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument by name, as Python would bind them."""
        if len(args) > len(self._positional):
            raise TypeError(
                f"{self.__name__}() takes {len(self._positional)} positional arguments, "
                f"got {len(args)}"
            )
        given = dict(zip(self._positional, args, strict=False))
        for name in kwargs:
            if name not in self._names or name in given:
                raise TypeError(f"{self.__name__}() got an unexpected argument {name!r}")
        arguments = {**self._defaults, **given, **kwargs}
        missing = [name for name in self._names if name not in arguments]
        if missing:
            raise TypeError(f"{self.__name__}() needs {' and '.join(missing)}")
        return arguments

    def _check_tensors(self, arguments: dict[str, Any]) -> torch.device:
        """Check every tensor against its annotation, and return their device."""
        sizes: Sizes = {}
        by_index = arguments.get("rows") is not None
        binding = self._binding_by_index if by_index else self._binding
        like = binding[0][0].of(arguments)
        for part, shape in binding:
            for name, tensor in part.tensors(arguments):
                shape.bind(name, tensor, sizes)
        if self._check is not None:
            self._check(**arguments)
        for part, shape in binding if by_index else self._checked:
            for name, tensor in part.tensors(arguments):
                shape.check(name, tensor, sizes, like)
        device: torch.device = like.device
        return device

    def _register(self, name: str, function: Callable[..., Any], impl: str) -> Any:
        def run(*values: Any) -> Any:
            return function(**self._unflat(values))

        parameters = [
            inspect.Parameter(
                part.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=part.hint
            )
            for part in self._parts
        ]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            parameters, return_annotation=self._result
        )
        schema = torch.library.infer_schema(run, mutates_args=self._writes)
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        qualified = f"trimkv_kernels::{name}"
        torch.library.register_fake(qualified, self._run_fake, lib=_LIBRARY)
        if self._grad is not None:
            self._register_grad(qualified, self._grad, impl)
        return getattr(torch.ops.trimkv_kernels, name).default

    def _unflat(self, values: Sequence[Any]) -> dict[str, Any]:
        """The op's arguments from the schema's."""
        arguments: dict[str, Any] = {}
        tensors: dict[tuple[str, Any], dict[str, Any]] = {}
        for part, value in zip(self._parts, values, strict=True):
            if part.tensor is None:
                arguments[part.argument] = value
            else:
                held = tensors.setdefault((part.argument, part.holder), {})
                held[part.tensor] = tuple(value) if part.tensor == "fields" else value
        for (name, holder), held in tensors.items():
            is_given = any(value is not None for value in held.values())
            arguments[name] = holder(**held) if is_given else None
        return arguments

    def _run_fake(self, *values: Any) -> Any:
        return None if self._fake is None else self._fake(**self._unflat(values))

    def _register_grad(self, qualified: str, grad: Grad, impl: str) -> None:
        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            kept = outputs if grad.saves_outputs else (None,) * len(outputs)
            ctx.num_inputs = len(inputs)
            ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
            tensors = [x if isinstance(x, Tensor) else None for x in inputs]
            ctx.save_for_backward(*tensors, *kept)

        def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            inputs = [
                plain if tensor is None else tensor
                for tensor, plain in zip(saved, ctx.plain, strict=False)
            ]
            outputs = saved[ctx.num_inputs :]
            return tuple(grad.run(inputs, outputs, grads, ctx.needs_input_grad, impl))

        torch.library.register_autograd(qualified, run, setup_context=save, lib=_LIBRARY)


def op(
    *,
    torch: Callable[..., R],
    writes: Sequence[str] = (),
    check: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    grad: Grad | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an `Op` of the function that launches its Triton kernels.

    Args:
        torch: The torch implementation. It has the declaration's parameters without ``impl``.
        writes: The tensors that are written to, exactly; of the slots as ``"slots.key"``.
        check: Called with the arguments by name, once the ranks are right, for what annotations do
            not say. Raises `ValueError`.
        fake: Called with the arguments by name; returns empty tensors like the result. None if the
            op returns nothing.
        grad: How the op is differentiated; None if it is not.
    """
    options = {"writes": writes, "check": check, "fake": fake, "grad": grad}
    return lambda launch: Op(launch, torch, **options)  # type: ignore[arg-type]


def _parts(name: str, hint: Any) -> list[_Part]:
    """The schema's arguments for one argument of the op."""
    plain, notes = _split(hint)
    holder = _OPTIONAL.get(plain, plain)
    if holder not in _HOLDERS:
        return [_Part(name, None, None, plain, _shape(notes))]
    used = next((note.names for note in notes if isinstance(note, Uses)), tuple(_HOLDERS[holder]))
    parts = []
    for tensor in used:
        inner, notes = _split(_HOLDERS[holder][tensor])
        inner = Sequence[Tensor] if tensor == "fields" else inner
        may_lack = plain is not holder and _split(inner)[0] in (Tensor, float, int)
        parts.append(
            _Part(name, tensor, holder, inner | None if may_lack else inner, _shape(notes))
        )
    return parts


def _shape(notes: tuple[Any, ...]) -> Shape | None:
    return next((note for note in notes if isinstance(note, Shape)), None)


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what `Annotated` adds to it."""
    if get_origin(hint) is Annotated:
        plain, *notes = get_args(hint)
        return plain, tuple(notes)
    return hint, ()
