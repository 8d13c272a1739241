"""The table of all GPU kernels: what each kernel file of this folder says, one after the other."""

from __future__ import annotations

from .load import kernel_files
from .variant import Variant, Work


def variants() -> list[Variant]:
    """Every kernel to compile, in the order of its file's name.

    Raises:
      ValueError: two kernels have the same name, or an argument is neither in the signature nor a constant.
    """
    found: dict[str, Variant] = {}
    for module in kernel_files():
        for variant in module.variants():
            if variant.name in found:
                raise ValueError(f"two GPU kernels are called `{variant.name}`; the second is in `{module.__file__}`")
            check_arguments(variant)
            found[variant.name] = variant
    return list(found.values())


def work() -> list[Work]:
    """What calls of the kernels cost at stated shapes; from the files that say so."""
    return [one for module in kernel_files() if hasattr(module, "work") for one in module.work()]


def check_arguments(variant: Variant) -> None:
    """Hold a variant against its function's parameters: the same names, run-time ones in the same order."""
    parameters = list(variant.function.arg_names)
    run_time = [name for name in parameters if name not in variant.constants]
    if run_time != list(variant.signature):
        raise ValueError(
            f"GPU kernel `{variant.name}`: expected the signature {run_time} from its function, "
            f"found {list(variant.signature)}"
        )
    unknown = [name for name in (*variant.constants, *variant.aligned_arguments) if name not in parameters]
    if unknown:
        raise ValueError(f"GPU kernel `{variant.name}`: its function has no parameter {unknown}")
