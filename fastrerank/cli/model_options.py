"""The options that choose how a checkpoint ranks and computes, as one parameter of the commands that load one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, get_type_hints

import typer

import fastrerank
from fastrerank.cli import shared as cli

__all__ = ["NO_CHOICE", "ModelOptions", "with_model_options"]


@dataclass(frozen=True)
class ModelOptions:
    """Values of the options; None for one that was not given."""

    method: cli.Method = None
    template: cli.TemplateOption = None
    instruction: cli.Instruction = None
    max_length: cli.MaxLength = None
    engine: cli.EngineOption = None
    dtype: cli.DtypeOption = cli.Dtype.auto
    device: cli.Device = None

    def keywords(self, **more: Any) -> dict[str, Any]:
        """The keywords of `fastrerank.load` for what was given here and in `more`."""
        given = {name: value for name, value in (vars(self) | more).items() if value is not None}
        if self.dtype is cli.Dtype.auto:
            del given["dtype"]
        return {name: getattr(value, "value", value) for name, value in given.items()}

    def load(self, checkpoint: str, **more: Any) -> Any:
        """The reranker of a checkpoint; a usage error for an option that its method does not know."""
        given = {"method": self.method, **self.keywords(**more)}
        try:
            return fastrerank.load(checkpoint, **given)
        except TypeError as error:
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if found is None or found[1] not in given:
                raise
            what = f"method {self.method}" if self.method else "the method of this checkpoint"
            option = "--" + {"num_threads": "threads"}.get(found[1], found[1]).replace("_", "-")
            raise typer.BadParameter(f"{what} does not know it", param_hint=option) from None


NO_CHOICE = ModelOptions()


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, which takes `options: ModelOptions`, an option of the command line for each field of it."""
    fields = get_type_hints(ModelOptions, include_extras=True)
    own = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "options":
            defaults = vars(NO_CHOICE)
            parameters += [parameter.replace(name=f, annotation=fields[f], default=defaults[f]) for f in fields]
        else:
            parameters.append(parameter.replace(annotation=own[name]))

    @wraps(command)
    def run(**values: Any) -> None:
        command(options=ModelOptions(**{name: values.pop(name) for name in fields}), **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
