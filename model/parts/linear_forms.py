"""What a config says of the form of layers' linear maps."""

import dataclasses

from weft.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearForm:
    """What all kinds of `model.adapter` and of `model.weights` have; a kind extends it by its own fields, and by `kind`.

    Attributes:
        targets: linear maps of the layers, by their weight's role (`matrix`, `expert`) or by name, in which a star stands for
            anything: `attention.q`, `mlp.*`.
    """

    kind: str
    targets: tuple[str, ...] = ('matrix', 'expert')

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError(
                f'targets of kind {self.kind} is []: it must name a linear map; for example ["matrix", "expert"]'
            )
