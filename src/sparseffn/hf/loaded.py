"""Models of transformers that look at what a checkpoint held before anybody uses them."""

from __future__ import annotations

from typing import Any


class LoadedWithCheck:
    """A model whose `_check_found` may refuse a checkpoint by the names of its parameters."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As any model's.

        Raises:
            UserError: the checkpoint does not fit the model.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        folder = args[0] if args else kwargs.get("pretrained_model_name_or_path", "folder")
        model._check_found(str(folder), set(info["missing_keys"]), set(info["unexpected_keys"]))
        return (model, info) if wants_info else model

    def _check_found(self, folder: str, missing: set[str], unexpected: set[str]) -> None:
        """Look at the model's names that the checkpoint lacks, and at the checkpoint's that are not the model's.

        Raises:
            UserError: they do not fit.
        """
        raise NotImplementedError
