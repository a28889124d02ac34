"""The tensors of a quantised checkpoint put together by the matrix that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from arriero.errors import ArrieroError
from arriero.graphs.sources.weight_source import WeightSource

AGAIN = "The checkpoint is incomplete or was edited: download it again"


@dataclass
class StoredModule:
    """What is stored of one matrix: `parts` by the ends of their names, such as weight_packed and weight_scale."""

    name: str
    parts: dict[str, WeightSource] = field(default_factory=dict)
    problems: list[ArrieroError] = field(default_factory=list)

    def refuse(self, part: str, what: str, expected: str | None = None, remedy: str = AGAIN) -> None:
        """Note what is wrong with a part."""
        where = self.parts[part].stored if part in self.parts else self.name
        self.problems.append(ArrieroError(what, where=where, expected=expected, remedy=remedy))

    def take(self, part: str, dtypes: Collection[str], shapes: Collection[tuple[int, ...]] = ()) -> WeightSource | None:
        """The part, which must be there, in one of `dtypes` and of one of `shapes` (any if none is given)."""
        source = self.parts.get(part)
        if source is None:
            stored = ", ".join(sorted(self.parts))
            self.refuse(
                part, f"has no {part}, only {stored}", "a scale with every weight and a weight with every scale"
            )
        elif source.dtype not in dtypes:
            self.refuse(part, f"{self.name}.{part} is stored as {source.dtype}", " or ".join(sorted(dtypes)))
        elif shapes and source.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            self.refuse(part, f"{self.name}.{part} has shape {list(source.shape)}", expected)
        else:
            return source
        return None


def split_modules(
    tensors: Mapping[str, WeightSource], endings: Mapping[str, str], unless: Collection[str] = ()
) -> tuple[dict[str, StoredModule], dict[str, WeightSource]]:
    """The quantised matrices among `tensors`, and all other tensors.

    `endings` maps what a tensor's name may end with (`.weight_scale`) to the part that it is. A matrix is quantised
    where any part is stored that is not in `unless`, which names parts that plain matrices have too.
    """
    modules: dict[str, StoredModule] = {}
    others: dict[str, WeightSource] = {}
    for name, source in tensors.items():
        ending = max((end for end in endings if name.endswith(end)), key=len, default=None)
        if ending is None:
            others[name] = source
        else:
            stem = name.removesuffix(ending)
            modules.setdefault(stem, StoredModule(stem)).parts[endings[ending]] = source
    for stem in [stem for stem, module in modules.items() if set(module.parts) <= set(unless)]:
        module = modules.pop(stem)
        others |= {source.name: source for source in module.parts.values()}
    return modules, others
