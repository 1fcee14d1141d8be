"""Which parameters of a model learn: all, all but frozen ones, or low-rank adapters on frozen weights (LoRA, peft).

Adapters are merged into the saved weights, so nothing downstream needs to know of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from pipelines.recipe import Recipe
from preprocessing.errors import UserError


def adapt(model: nn.Module, recipe: Recipe, fresh: Collection[str] = ()) -> None:
    """Freeze parameters and insert adapters in place, as the recipe says. Call it before making an optimizer.

    ``fresh`` names the parameters without trained values, which learn in full besides the adapters. Adapters start at
    zero, so the model's output is unchanged. Raises UserError like ``learning``.
    """
    plan = learning(model, recipe, fresh)
    if recipe.lora and plan.adapted:
        from peft import LoraConfig, inject_adapter_in_model  # imported lazily: slow

        lora = LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=[*plan.adapted])  # type: ignore[arg-type]
        inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name in plan.whole)


@dataclass(frozen=True)
class Learning:
    """Names of the parameters that learn in full, and of the linear layers with an adapter."""

    whole: frozenset[str]
    adapted: tuple[str, ...]


def learning(model: nn.Module, recipe: Recipe, fresh: Collection[str] = ()) -> Learning:
    """Return what would learn after ``adapt``. The model may be on the meta device.

    Raises UserError if a pattern of the recipe matches nothing, or if nothing would learn.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = _matching("freeze", recipe.freeze, names, "parameter")
    adapted: list[str] = []
    if recipe.lora:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = _matching("lora.targets", recipe.lora.targets, linear, "linear layer")
        kept = frozen | set(fresh)  # fresh layers learn in full and need no adapter
        adapted = [name for name in linear if name in targets and f"{name}.weight" not in kept]
    whole = frozenset(names if recipe.lora is None else fresh) - frozen
    if not whole and not adapted:
        raise UserError("freeze: nothing is left to learn; freeze less")
    return Learning(whole, tuple(adapted))


def merged(state: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Return the plain model's state dict: each adapter is added to the weight it belongs to."""
    plain = {}
    for name, value in state.items():
        module, inside, kind = name.partition(".base_layer.")
        if inside and kind == "weight":
            assert recipe.lora is not None
            down, up = (state[f"{module}.lora_{side}.default.weight"].float() for side in "AB")
            value = (value.float() + recipe.lora.alpha / recipe.lora.rank * (up @ down)).to(value.dtype)
        if ".lora_" not in name:
            plain[f"{module}.{kind}" if inside else name] = value
    return plain


def adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters alone, by the names under which peft saves them; empty if there are none."""
    return {name.replace(".default.", "."): value for name, value in state.items() if ".lora_" in name}


def learning_sizes(model: nn.Module, recipe: Recipe, fresh: Collection[str] = ()) -> dict[str, int]:
    """Return how many values learn, by parameter name; an adapter counts under its layer's weight."""
    plan = learning(model, recipe, fresh)
    learn = {name: value.numel() for name, value in model.named_parameters() if name in plan.whole}
    for name in plan.adapted:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear) and recipe.lora
        learn[f"{name}.weight"] = recipe.lora.rank * (layer.in_features + layer.out_features)
    return learn


def _matching(key: str, patterns: Iterable[str], names: Collection[str], what: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            some = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) + ".*" for name in names))
            raise UserError(f"{key}: {pattern} matches no {what}; names are like {some}")
        found |= matches
    return found
