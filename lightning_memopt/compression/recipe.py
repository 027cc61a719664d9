"""A recipe: what to prune, cluster and quantize, in that order, as plain data that a YAML file can hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import nn

from lightning_memopt.compression.choose import Choice, Method, check_sparsity
from lightning_memopt.compression.clustering import check_clusters, cluster_weights
from lightning_memopt.compression.graph import Call
from lightning_memopt.compression.masks import prune_weights, share_of_zeros
from lightning_memopt.compression.quantize import packing, quantize
from lightning_memopt.compression.ranges import Range
from lightning_memopt.compression.report import CompressionReport, compression_report
from lightning_memopt.compression.selection import WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.compression.structured import prune_structured

_SELECTS = ("include", "exclude")
_KNOWN = {
    "prune": ("amount", "method", "pattern", "scope", "embeddings", "seed", *_SELECTS),
    "cluster": ("n", "init", "embeddings", "seed", *_SELECTS),
    "quantize": ("scheme", "engine", *_SELECTS),
}
_NEEDED = {"prune": "amount", "cluster": "n", "quantize": "scheme"}


@dataclass(frozen=True)
class Recipe:
    """What to do to a module, in the order of the attributes.

    Attributes:
        prune: Arguments of :func:`~lightning_memopt.compression.masks.prune_weights`, or with
            ``method: structured`` of :func:`~lightning_memopt.compression.structured.prune_structured`.
        cluster: Arguments of :func:`~lightning_memopt.compression.clustering.cluster_weights`.
        quantize: Steps of ``scheme``, ``engine``, ``include`` and ``exclude``; several make a mixed recipe. Layers
            that an earlier step took are left to it.
        module: The class that the recipe is for, as ``"package.module:Class"``: how ``lightning-memopt compress``
            builds the module of a checkpoint that does not name it. ``None``: whichever it is given.

    Example:
        >>> Recipe.from_dict({"prune": {"amount": 0.5}, "quantize": "int8"}).quantize
        ({'scheme': 'int8'},)
    """

    prune: Mapping[str, Any] | None = None
    cluster: Mapping[str, Any] | None = None
    quantize: tuple[Mapping[str, Any], ...] = field(default=())
    module: str | None = None

    @classmethod
    def from_dict(cls, content: Any) -> "Recipe":
        """Check what a file holds.

        Raises:
            ValueError: It is no mapping, names an unknown step or argument, asks for nothing, or for what no module
                can be given.
        """
        named = [key for key in content if key != "module"] if isinstance(content, Mapping) else []
        if not named:
            raise ValueError(f"a recipe names some of {', '.join(_KNOWN)}; this one is {content!r}")
        if unknown := [str(key) for key in named if key not in _KNOWN]:
            raise ValueError(f"{', '.join(unknown)} is no step of a recipe; there are {', '.join(_KNOWN)}")
        steps = content.get("quantize", [])
        steps = [steps] if isinstance(steps, str | Mapping) else steps
        if not isinstance(steps, list):
            raise ValueError(f"quantize is a scheme, a mapping, or a list of these, not {steps!r}")
        if not steps and named == ["quantize"]:
            raise ValueError("quantize is an empty list and the only step, so that the recipe asks for nothing")
        module = content.get("module")
        if module is not None and not isinstance(module, str):
            raise ValueError(f"module is a class as package.module:Class, not {module!r}")
        recipe = cls(
            prune=_checked("prune", content["prune"]) if "prune" in content else None,
            cluster=_checked("cluster", content["cluster"]) if "cluster" in content else None,
            quantize=tuple(_checked("quantize", {"scheme": one} if isinstance(one, str) else one) for one in steps),
            module=module,
        )
        recipe._check_values()
        return recipe

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a YAML file.

        Raises:
            ValueError: It is no YAML, or no recipe.
            OSError: It cannot be read.
        """
        import yaml

        class Loader(yaml.SafeLoader):
            """Refuses a key that is there twice, of which YAML takes the last."""

            def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
                keys = [key.value for key, _ in node.value]
                if twice := [key for key in keys if keys.count(key) > 1]:
                    raise ValueError(f"{path} has {twice[0]!r} twice, and YAML would take the last; make one of both")
                return super().construct_mapping(node, deep)

        try:
            content = yaml.load(Path(path).read_text(), Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        prune = content.get("prune") if isinstance(content, Mapping) else None
        if isinstance(prune, dict) and type(pattern := prune.get("pattern")) is int:
            prune["pattern"] = ":".join(map(str, divmod(pattern, 60)))  # 2:4 without quotes is a time to YAML
        return cls.from_dict(content)

    def _check_values(self) -> None:
        """Raise for what can be told without a module, so that no step is done before it."""
        if self.prune is not None:
            check_sparsity(self.prune["amount"])
            methods = (*get_args(Method), "structured")
            if (method := self.prune.get("method", "magnitude")) not in methods:
                more = "; n of m is said by a pattern, such as pattern: '2:4'" if method == "n:m" else ""
                raise ValueError(f"method={method!r} is none of {', '.join(map(repr, methods))}{more}")
            if method == "structured":
                if extra := sorted(set(self.prune) - {"amount", "method", *_SELECTS}):
                    raise ValueError(f"{', '.join(extra)} means nothing with method: structured; leave it out")
            else:
                how = {key: value for key, value in self.prune.items() if key in ("method", "pattern", "scope")}
                Choice(**how).pattern.limit(self.prune["amount"])
        if self.cluster is not None:
            check_clusters(self.cluster["n"], self.cluster.get("init", "kmeans++"))
        for step in self.quantize:
            packing(step["scheme"], step.get("engine", "memopt"))

    def apply(
        self, module: nn.Module, call: Call | None = None, *, input_ranges: Mapping[str, Range] | None = None
    ) -> CompressionReport:
        """Compress ``module`` in place.

        Args:
            module: A trained module.
            call: Runs it once, for structured pruning; see
                :func:`~lightning_memopt.compression.structured.prune_structured`.
            input_ranges: For ``"int8_static"``; see :func:`~lightning_memopt.compression.quantize.quantize`.

        Raises:
            ValueError: A step cannot be done to this module.
        """
        self._check_values()
        before = measure_sizes(module, packed=False)
        skipped: dict[str, str] = {}
        fallbacks: dict[str, str] = {}
        sparsity = None
        if self.prune is not None:
            how = dict(self.prune)
            amount = how.pop("amount")
            if how.get("method") == "structured":
                del how["method"]
                if call is None:
                    raise ValueError(
                        "method: structured follows one run of the module, and there are no inputs to run it on. "
                        f"Give {type(module).__name__} an example_input_array"
                    )
                skipped.update(prune_structured(module, amount, call, **how).skipped)
            else:
                masks = prune_weights(module, amount, **how)
                sparsity = share_of_zeros(module, masks.weights)
                skipped.update(masks.skipped)
        if self.cluster is not None:
            how = dict(self.cluster)
            cluster_weights(module, how.pop("n"), **how)
        packed: set[str] = set()
        for step in self.quantize:
            which = WeightFilter(step.get("include"), _joined(step.get("exclude"), packed), embeddings=True)
            engine = step.get("engine", "memopt")
            done = quantize(module, step["scheme"], which, input_ranges, engine=engine)
            packed.update(done.packed)
            skipped.update(done.skipped)
            fallbacks.update(done.fallbacks)
        skipped = {name: reason for name, reason in skipped.items() if name not in packed}
        return compression_report(before, module, skipped=skipped, fallbacks=fallbacks, eligible_sparsity=sparsity)


def _checked(step: str, arguments: Any) -> Mapping[str, Any]:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{step} takes arguments such as {_NEEDED[step]}, not {arguments!r}")
    if unknown := [str(key) for key in arguments if key not in _KNOWN[step]]:
        raise ValueError(f"{', '.join(unknown)} is no argument of {step}; there are {', '.join(_KNOWN[step])}")
    if _NEEDED[step] not in arguments:
        raise ValueError(f"{step} lacks {_NEEDED[step]}")
    for name in ("scheme", "engine", "method", "scope", "init"):
        if not isinstance(arguments.get(name, ""), str):
            raise ValueError(f"{name} of {step} is a word, not {arguments[name]!r}")
    if not isinstance(embeddings := arguments.get("embeddings", False), bool):
        raise ValueError(f"embeddings of {step} is true or false, not {embeddings!r}")
    if not isinstance(seed := arguments.get("seed", 0), int):
        raise ValueError(f"seed of {step} is a whole number, not {seed!r}")
    return dict(arguments)


def _joined(exclude: Any, packed: set[str]) -> Any:
    given = [] if exclude is None else [exclude] if isinstance(exclude, str | type) else list(exclude)
    return [*given, *sorted(packed)] or None
