"""`export`: a run's model as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sparseffn.cli.output import print_json
from sparseffn.cli.run_settings import Export
from sparseffn.errors import UserError
from sparseffn.report.comparison_report import comparison_table
from sparseffn.report.markdown import markdown_table
from sparseffn.results.comparison_result import read_comparison


def export(settings: Export) -> int:
    """Write the folder and say how it is loaded."""
    try:
        from transformers.utils.logging import disable_progress_bar

        from sparseffn.hf.export import export_run
    except ImportError as error:
        raise UserError(f"`export` needs the extra; got none ({error}); fix: pip install 'sparseffn[hf]'") from None
    # A model of ours is written in a moment.
    disable_progress_bar()
    run = Path(settings.run)
    exported = export_run(
        run,
        settings.to,
        checkpoint=settings.checkpoint,
        results=_of_comparison(run),
        with_tokenizer=not settings.without_tokenizer,
    )
    if settings.json:
        print_json({**dataclasses.asdict(exported), "path": str(exported.path)})
        return 0
    print(f"{exported.path}: {exported.n_params:,} parameters after step {exported.step:,}, with a model card")
    print(f'load it with: import sparseffn.hf; AutoModelForCausalLM.from_pretrained("{exported.path}")')
    return 0


def _of_comparison(run: Path) -> str:
    """The table of the comparison that a run is part of, at `OUT/runs/METHOD/seed-N`; "" where there is none."""
    place = run.resolve()
    found = place.parents[2] / "comparison.json" if len(place.parents) > 2 and place.parents[1].name == "runs" else None
    if found is None or not found.exists():
        return ""
    which = f"This model is `{place.parent.name}`, {place.name.replace('-', ' ')}, of this comparison:"
    return f"{which}\n\n{markdown_table(comparison_table(read_comparison(found)))}"
