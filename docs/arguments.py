"""For the site's build: what the reference shows of a class besides its docstring.

An argument means the same for every module, so it is described once, in the `Args` of one class.
Here each class gets the list of all its own arguments, in the order of its constructor, with
annotations and defaults. Everything is read from the sources, nothing is imported.
"""

from __future__ import annotations

from typing import Any

from griffe import (
    Class,
    DocstringParameter,
    DocstringSectionExamples,
    DocstringSectionParameters,
    Extension,
    Function,
    Module,
    Parameter,
    ParameterKind,
    Parameters,
)

#: Where the constructors are that share their arguments.
MODULES = ("modules", "sync_modules")


class Arguments(Extension):
    """Called by griffe, which reads the sources for mkdocstrings."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Complete the classes of the package once all of them are read."""
        modules = [pkg.modules[name] for name in MODULES]
        layers = [m.classes[str(name)] for m in modules for name in m.exports or ()]
        described = {
            argument.name: argument.description
            for layer in layers
            for section in _sections(layer)
            if isinstance(section, DocstringSectionParameters)
            for argument in section.value
        }
        for layer in layers:
            _list_arguments(layer, described)
        for module in pkg.modules.values():
            for cls in module.classes.values():
                if not cls.is_alias and "NamedTuple" in map(str, cls.bases):
                    _add_constructor(cls)


def _sections(cls: Class) -> list[Any]:
    return cls.docstring.parsed if cls.docstring else []


def _list_arguments(layer: Class, described: dict[str, str]) -> None:
    """Put the list of all arguments where the docstring has its own, or before the example."""
    constructor: Any = layer.all_members["__init__"]  # a function, or another name of one
    arguments = [
        DocstringParameter(
            argument.name,
            description=described[argument.name],
            annotation=argument.annotation,
            value=argument.default,
        )
        for argument in constructor.parameters
        if argument.name != "self"
    ]
    sections = _sections(layer)
    kinds = (DocstringSectionParameters, DocstringSectionExamples)
    place = next(i for i, section in enumerate(sections) if isinstance(section, kinds))
    end = place + isinstance(sections[place], DocstringSectionParameters)
    sections[place:end] = [DocstringSectionParameters(arguments)]


def _add_constructor(cls: Class) -> None:
    """A named tuple's, whose arguments are its fields."""
    fields = [a for a in cls.attributes.values() if "instance-attribute" in a.labels]
    kind = ParameterKind("positional or keyword")
    parameters = [Parameter(f.name, annotation=f.annotation, kind=kind) for f in fields]
    cls.set_member("__init__", Function("__init__", parameters=Parameters(*parameters)))
