"""An extension of griffe, which reads the sources for the reference: `Annotated[int, option("Experts.")]` is an int."""

from __future__ import annotations

from typing import Any

import griffe


class PlainAnnotations(griffe.Extension):
    """Shows the type of a config's field; its meaning is in the table of options."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        annotation = attr.annotation
        if isinstance(annotation, griffe.ExprSubscript) and annotation.canonical_name == "Annotated":
            slice_ = annotation.slice
            attr.annotation = slice_.elements[0] if isinstance(slice_, griffe.ExprTuple) else slice_
