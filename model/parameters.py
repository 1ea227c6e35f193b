"""Weights: each is declared once, in its layer, on one line: shape, layout, scale, role. All else follows from that line.

A module's `__init__` makes no array: each `nnx.Param` of it holds a `Parameter`, which says what the weight is. So a model's
weights can be read in a millisecond, without a mesh and without JAX's tracing: for counts and bytes (planner/), for what a mesh
must divide (model/sizes.py), for optimizer groups, for restoring; a published tensor finds its place by the weight's name
(hub/). `initialise` makes the arrays, each born in its layout. Outside `jax.shard_map` the module then holds global arrays,
whose types carry their layout; inside, the same module holds this device's shards.
"""

import dataclasses
import enum
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from weft.sharding.mesh import AXES, FSDP, Divides, MeshConfig, as_axes, split_axes

Module = TypeVar('Module', bound=nnx.Module)
EVERY = (*FSDP, 'tensor')  # axes that split a weight of tokens whose dims are all whole on each device


class Role(enum.Enum):
    """What a weight is for, from which follow weight decay, optimizer group, stored dtype, and whether decoding narrows it."""

    MATRIX = 'matrix'  # of a linear map
    EXPERT = 'expert'  # of the linear maps of experts: [experts, …]
    EMBEDDING = 'embedding'  # rows that are looked up
    HEAD = 'head'  # to the vocabulary
    ROUTER = 'router'  # to the experts' scores
    SCALE = 'scale'  # of a norm
    BIAS = 'bias'
    VECTOR = 'vector'  # any other that is multiplied or added element by element
    CORRECTION = 'correction'  # moved by the training step itself, not by a gradient
    FROZEN = 'frozen'  # of a linear map that learns no more: it has no gradient, and does not decay
    CODES = 'codes'  # of a weight that is kept in a few bits: whole numbers, which have no gradient

    @property
    def decays(self) -> bool:
        """Whether weight decay pulls it towards 0: matrices and tables, not what scales or shifts."""
        return self in (Role.MATRIX, Role.EXPERT, Role.EMBEDDING, Role.HEAD, Role.ROUTER)

    @property
    def learns(self) -> bool:
        """Whether training computes a gradient of it, and keeps an optimizer's state."""
        return self not in (Role.FROZEN, Role.CODES)

    @property
    def narrow(self) -> bool:
        """Whether decoding keeps it in the compute dtype; routers, scales and biases stay as wide as they are stored."""
        return (self.decays and self is not Role.ROUTER) or self is Role.FROZEN

    def dtype(self, stored: Any) -> jnp.dtype:
        """The dtype it is stored in, where `stored` is that of the model's weights."""
        return jnp.promote_types(stored, jnp.float32) if self is Role.CORRECTION else jnp.dtype(stored)


class Size(int):
    """The size of a dim, which knows the config's field that it comes from: what a mesh must divide is told by it.

    Attributes:
        field: the name of the field, such as `model.attention.heads`.
        units: what must be divided: for heads side by side their number, not their width.
    """

    field: str
    units: int

    def __new__(cls, size: int, field: str, units: int | None = None) -> 'Size':
        found = super().__new__(cls, size)
        found.field, found.units = field, int(size) if units is None else units
        return found

    def __getnewargs__(self) -> tuple[int, str, int]:  # type: ignore[override]  # to be copied; int itself has one argument
        return int(self), self.field, self.units


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One weight, as it is declared.

    Attributes:
        shape: global; sizes that a mesh axis splits are `Size`s, so that a refusal can name the field.
        layout: the mesh axes that split each dim.
        role: what it is for.
        scale: standard deviation of its normal initial values; 0: all are `value`.
        value: what all of it is at first.
        gathered: the axes over which its shards are gathered where it is used.
        out_first: a matrix kept as out × in, as torch's Linear has it; else in × out.
        part: what a plan counts it under: attention, mlp, experts …
        repeats: heads of keys or values, where more devices of `tensor` than these have copies: each is gathered over `tensor`.
        of_source: it makes keys or values of what an encoder has read, and decoding keeps those instead.
        dtype: what it is stored in, whatever the model's weights are; None: in theirs, as the role says.
        padded: its dim that is filled up to `ModelConfig.padded_vocabulary`.
        layers: of a stack of layers their numbers in the model; then arrays have a leading dim of as many.
        split_layers: the mesh axis that splits those.
    """

    shape: tuple[int, ...]
    layout: P
    role: Role
    scale: float = 0.0
    value: float = 0.0
    gathered: tuple[str, ...] = ()
    out_first: bool = False
    part: str = ''
    repeats: int | None = None
    of_source: bool = False
    dtype: str | None = None
    padded: int | None = None
    layers: tuple[int, ...] | None = None
    split_layers: str | None = None

    def stored(self, weights: Any) -> jnp.dtype:
        """The dtype it is stored in, where `weights` is that of the model's."""
        return self.role.dtype(weights) if self.dtype is None else jnp.dtype(self.dtype)

    def in_use(self, compute: Any, weights: Any) -> jnp.dtype:
        """The dtype it has while the model is used, where `compute` is that of what is computed."""
        return jnp.dtype(compute) if self.narrow else self.stored(weights)

    @property
    def narrow(self) -> bool:
        """Whether decoding keeps it in the compute dtype."""
        return self.role.narrow and self.dtype is None

    @property
    def size(self) -> int:
        """Numbers of one layer's."""
        return math.prod(self.shape)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Of its array: with the stack's dim."""
        return tuple(map(int, self.shape)) if self.layers is None else (len(self.layers), *map(int, self.shape))

    @property
    def global_layout(self) -> P:
        """Of its array: with the stack's dim."""
        return self.layout if self.layers is None else P(self.split_layers, *self.layout)

    def local_shape(self, mesh: MeshConfig) -> tuple[int, ...]:
        """Of one layer's, what one device has."""
        ways = (mesh.span(as_axes(axes)) for axes in self.layout)
        return tuple(int(size) // n for size, n in zip(self.shape, ways, strict=True))

    def held(self, mesh: MeshConfig) -> int:
        """How many layers' of it one device has."""
        layers = 1 if self.layers is None else len(self.layers)
        return layers // mesh.span((self.split_layers,)) if self.split_layers else layers

    @property
    def split(self) -> tuple[str, ...]:
        """The axes that split one of its own dims."""
        return split_axes(self.layout)

    @property
    def in_first(self) -> bool:
        """Whether it is a linear map that is kept as in × out."""
        return self.role in (Role.MATRIX, Role.EXPERT, Role.HEAD, Role.ROUTER, Role.FROZEN) and not self.out_first

    def rules(self) -> Iterator[Divides]:
        """What a mesh must divide to hold it."""
        for size, axes in zip(self.shape, self.layout, strict=True):
            if axes:
                assert isinstance(size, Size), f'{self}: a dim that is split needs a Size, which names its field'
                yield Divides(tuple(axis for axis in AXES if axis in as_axes(axes)), size.field, size.units)

    def init(self, key: jax.Array, stored: Any) -> jax.Array:
        """Its initial values in its layout, of which no device ever holds more than its part: the same on every mesh.

        A layer's depend on the key, the layer's number and the shape, not on which layers are stacked with it.
        """
        dtype, shape = self.stored(stored), tuple(map(int, self.shape))
        if not self.scale:
            return jnp.full(self.global_shape, self.value, dtype, out_sharding=self.global_layout)

        def normal(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape, dtype, out_sharding=self.layout) * self.scale

        if self.layers is None:
            return normal(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array(self.layers, jnp.uint32))
        return jax.vmap(normal)(jax.reshard(keys, P(self.split_layers)))


def parameter(shape: tuple[int, ...], layout: P, role: Role, **more: Any) -> nnx.Param[Any]:
    """Declares a weight: `self.scale_D = parameter((D,), P(None), Role.SCALE, value=1.0)`; more: fields of `Parameter`."""
    return nnx.Param(Parameter(shape, layout, role, **more))


def declared(module: nnx.Module) -> dict[str, Parameter]:
    """The weights of a module that holds no arrays yet, by name, such as `groups.0.attention.q.w_IO`."""
    return {name_of(path): found for path, found in jax.tree_util.tree_leaves_with_path(module)}


def name_of(path: Any) -> str:
    """A weight's name, of its path in the tree."""
    return jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')


def map_declared(change: Any, module: Module) -> Module:
    """The module with `change(name, parameter)` in the place of each declared weight."""
    return jax.tree_util.tree_map_with_path(lambda path, found: change(name_of(path), found), module)


def stack_layers(layer: Module, numbers: tuple[int, ...], axis: str | None) -> Module:
    """One layer's declarations as those of several like it, whose arrays have a leading dim that `axis` splits."""
    return jax.tree.map(lambda p: dataclasses.replace(p, layers=numbers, split_layers=axis), layer)


def initialise(module: Module, key: jax.Array, stored: Any) -> Module:
    """The module with arrays on the current mesh. Run it under `jax.jit`.

    Each weight's key is folded from its path, so that another weight more changes no other's values; the group of like layers
    that a layer is in does not count. `stored` is the dtype of weights.
    """

    def make(name: str, found: Parameter) -> jax.Array:
        path = re.sub(r'(^|\.)groups\.\d+\.', r'\1layers.', name)
        return found.init(jax.random.fold_in(key, zlib.crc32(path.encode())), stored)

    return map_declared(make, module)


def abstract(module: Module, stored: Any) -> Module:
    """The module with shapes, dtypes and layouts on the current mesh in the place of arrays; nothing is traced."""
    mesh: Any = jax.sharding.get_mesh()
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh  # a mesh that is only named, while files are read
    config = MeshConfig(**mesh.shape)

    def kind(name: str, found: Parameter) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, active(found.global_layout, config))
        return jax.ShapeDtypeStruct(found.global_shape, found.stored(stored), sharding=layout)

    return map_declared(kind, module)


def active(layout: P, mesh: MeshConfig) -> P:
    """A layout without axes of one device, as types have it."""

    def left(axes: Any) -> Any:
        some = tuple(axis for axis in as_axes(axes) if getattr(mesh, axis) > 1)
        return some if len(some) > 1 else some[0] if some else None

    return P(*map(left, layout))


def specs(tree: Any) -> Any:
    """The PartitionSpec of every array, read off its type."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def residual_gain(layers: int) -> float:
    """Scale of the projections that write to the residual stream (GPT-2, section 2.3): 2 per layer add up to about 1."""
    return (2 * layers) ** -0.5
