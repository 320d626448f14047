"""Which passes a `BuildConfig` runs, and for what."""

from __future__ import annotations

from typing import Final

from tokenmill.builder.passes import PASSES, Target
from tokenmill.config import BuildConfig
from tokenmill.errors import InvalidParameterError, did_you_mean
from tokenmill.ops.cpu.packing import FORMATS as INTEGER_KERNEL_FORMATS

NEEDED: Final = ("quantize_activations",)
"""What programs for the CPU's integer kernels cannot do without, at any `opt_level`."""


def disabled_passes(config: BuildConfig) -> tuple[str, ...]:
    """The names of all passes that are not to run.

    Raises:
        InvalidParameterError: a name is no pass, or `passes` names them in another order than they run in.
    """
    names = [one.name for one in PASSES]
    for field, given in (("passes", config.passes or ()), ("disabled_passes", config.disabled_passes)):
        for name in given:
            if name not in names:
                raise InvalidParameterError(
                    f"There is no pass '{name}'.", field=field, remedy=did_you_mean(name, names)
                )
    if config.passes is not None:
        order = [name for name in names if name in config.passes]
        if order != list(config.passes):
            raise InvalidParameterError(
                "The passes are not in the order in which they can run.",
                field="passes",
                remedy=f"Use the order {', '.join(order)}.",
            )
        chosen = set(config.passes)
    else:
        chosen = set(NEEDED) if config.opt_level == 0 else set(names)
    chosen -= set(config.disabled_passes)
    return tuple(name for name in names if name not in chosen)


def pass_target(device: str) -> Target:
    """What the passes compile for. Integer products are what the CPU's kernels do; on a GPU weights are decoded."""
    return Target(frozenset(INTEGER_KERNEL_FORMATS)) if device == "cpu" else Target()
