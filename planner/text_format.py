"""Numbers and meshes of a plan as a person reads them."""


def mesh_text(mesh: dict[str, int]) -> str:
    """The axes that are on."""
    return ' '.join(f'{axis}={n}' for axis, n in mesh.items() if n > 1) or 'data=1'


def amount(x: float) -> str:
    """A number with its prefix, as in `4.2 T`."""
    for unit, size in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(x) >= size:
            return f'{x / size:.3g} {unit}'
    return f'{x:.3g} '


def count(x: float) -> str:
    """A number of parameters or tokens as people tell it, as in `405.9 B`."""
    for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if x >= size:
            return f'{x / size:.4g} {unit}'
    return f'{x:.0f}'


def figure(x: float) -> str:
    """A number of hours or of money: whole where it is large, with three digits where it is small."""
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def gb(x: float) -> str:
    """Bytes as decimal gigabytes, as model sizes are told; what is small in a smaller unit, with three digits."""
    return f'{x / 1e9:,.2f} GB' if x >= 1e9 else f'{amount(x)}B'


def in_gib(x: float) -> str:
    """Bytes in GiB without the unit, three digits of what is small."""
    return f'{x / 2**30:.2f}' if x >= 2**30 else f'{x / 2**30:.3g}'
