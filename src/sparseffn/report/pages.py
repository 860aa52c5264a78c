"""How a page is made from a template."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def fill_template(name: str, **values: object) -> str:
    """A template of this package with its values, which are escaped."""
    environment = Environment(
        loader=PackageLoader("sparseffn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
