"""The model's config: what it accepts, and its way through JSON."""

from __future__ import annotations

import json
import re

import pytest

from models.small import SIZES, small_config, small_ffn
from sparseffn.errors import UserError
from sparseffn.ffn import list_methods, method_class
from sparseffn.models import TransformerXLConfig


@pytest.mark.parametrize("method", list_methods())
def test_json_round_trip(method: str) -> None:
    """Through text, for every method's examples."""
    for ffn in method_class(method).examples():
        config = TransformerXLConfig(**{**SIZES, "d_model": ffn.d_model}, dropout=0.25, ffn=ffn)
        assert TransformerXLConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_may_leave_out_dropout() -> None:
    """The one field with a default."""
    data = small_config().to_json()
    del data["dropout"]
    assert TransformerXLConfig.from_json(data) == small_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, "unknown model option 'n_layer'; fix: did you mean 'n_layers'"),
        ({"ffn": {"method": "dens"}}, "unknown method 'dens'; fix: did you mean 'dense'"),
        ({"ffn": {"method": "dense", "d_model": 8}}, "dense needs d_ff; got d_model"),
        ({"ffn": {"method": "dense", "d_model": 8, "d_ff": 4, "k": 1}}, "unknown option of dense 'k'"),
    ],
    ids=["unknown-field", "unknown-method", "missing-block-field", "unknown-block-field"],
)
def test_json_errors_name_the_key(changes: dict[str, object], message: str) -> None:
    """What is wrong, and the nearest names."""
    with pytest.raises(UserError, match=re.escape(message)):
        TransformerXLConfig.from_json({**small_config().to_json(), **changes})


def test_json_errors_list_what_is_missing() -> None:
    """All missing fields at once."""
    data = {key: value for key, value in small_config().to_json().items() if key not in ("n_heads", "ffn")}
    with pytest.raises(UserError, match="a model config needs n_heads, ffn; got vocab_size"):
        TransformerXLConfig.from_json(data)


@pytest.mark.parametrize("field", ["vocab_size", "d_model", "n_layers", "n_heads", "d_head"])
@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0, "at least 1"), (-1, "at least 1"), (2.0, "int"), ("2", "int")],
    ids=["zero", "negative", "float", "text"],
)
def test_sizes_are_positive_integers(field: str, value: object, wanted: str) -> None:
    """The message names field and value."""
    with pytest.raises(UserError, match=f"`{field}` must be {wanted}; got {value!r}"):
        TransformerXLConfig(**{**SIZES, field: value}, ffn=small_ffn())


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")], ids=["negative", "one", "nan"])
def test_dropout_is_a_rate_below_one(value: float) -> None:
    """Zero is allowed, one is not."""
    with pytest.raises(UserError, match="`dropout` must be at least 0 and below 1; got"):
        small_config(dropout=value)


def test_block_and_model_share_their_width() -> None:
    """Both widths are in the message."""
    with pytest.raises(UserError, match=r"`ffn.d_model` must be the model's d_model = 8; got 6"):
        TransformerXLConfig(**SIZES, ffn=small_ffn(d_model=6))
