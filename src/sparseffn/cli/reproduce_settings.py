"""What a user sets on `sparseffn reproduce`. Nothing here needs PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group

from sparseffn.cli.settings import Flag, Machine, MaybeInt, MaybeText, Places, Printed, Spread, Tokens, Words, settings_class

# Evidence either trains, for as long as it may, or lists what there is.
_WORK = create_mutex_group(required=True, title="work")


@settings_class
class Runs(Tokens, Spread, Printed):
    """What is trained, for tables and for evidence."""

    corpus: MaybeText = None
    """corpus of scales base and cpu (default: ptb, as characters)"""
    steps: MaybeInt = None
    """training steps (default: the scale's)"""
    pool: MaybeText = None
    """folder of the runs (default: pool in the user's cache folder)"""
    out: MaybeText = None
    """folder for the files (default: none are written)"""


@settings_class
class ReproduceTable(Runs):
    """Run tables of the paper at a chosen scale and print what was measured beside what was published.

    Runs are kept in a pool by the digest of their config: tables share them, and an interrupted command goes on. Tables 7, 8
    and 9 are counted, not trained. A label that is published for one row and shown for another needs `published:` or
    `shown:` in front.

    Examples:
      sparseffn reproduce table all --scale paper --dry-run    # every run of the paper: parameters, FLOPs, time
      sparseffn reproduce table table7                         # counted, no training
      sparseffn reproduce table table3 --data-dir ptb/ --columns WT-S --seeds 3
      sparseffn reproduce table table10 --corpus stdlib --columns WT-S --rows dense sigma-moe
      torchrun --nproc-per-node 2 -m sparseffn reproduce table table3 --data-dir ptb/ --strategy fsdp
    """

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...", help_behavior_hint="")]
    """table1 ... table10, or all; of our own: ptb, universal, inner, sweep-k, sweep-size, sweep-experts"""
    scale: Literal["paper", "base", "cpu"] = "cpu"
    """paper, base (about 10M parameters) or cpu, minutes a run"""
    settings: Literal["paper", "released"] = "paper"
    """the paper's, or those of the released runs"""
    columns: Words = ()
    """only these columns: WT-S WT-B E8 ..."""
    rows: Annotated[tuple[str, ...], arg(metavar="LABEL ...", help_behavior_hint="")] = ()
    """only these rows, by the published label or the shown one"""
    seeds: Annotated[tuple[str, ...], arg(metavar="N ...")] = ("1",)
    """a number of seeds, or several seeds"""
    jobs: int = 1
    """runs side by side, the threads divided among them"""
    view: Flag = False
    """print what the pool holds; train nothing"""
    dry_run: Flag = False
    """print every run with its cost; train nothing"""


@settings_class
class ReproduceEvidence(Runs):
    """Train the runs that decide the paper's claims, the most decisive first, one at a time, within a budget.

    Each call goes on with what is missing, then prints how all runs stand. An experiment's runs are missing where
    neither the pool nor its record in --out holds them, and are left out once its looks have decided what they are for.

    Examples:
      sparseffn reproduce evidence --list
      sparseffn reproduce evidence --budget 60m --data-dir ptb/
      sparseffn reproduce evidence --budget 8h --data-dir ptb/ --only control    # twice, side by side: none is done twice
    """

    scale: Literal["base", "cpu"] = "cpu"
    """base (about 10M parameters) or cpu, minutes a run"""
    budget: Annotated[MaybeText, _WORK] = None
    """start no run that would not fit: 90s, 60m, 2h"""
    list: Annotated[Flag, _WORK] = False
    """print the order and what is done; train nothing"""
    only: Words = ()
    """only these parts: control ablations experts table3 table10 table1 table6"""
    bench: MaybeText = None
    """a result of `bench layer`, for the claims on speed in OUT/claims.json (default: they stay open)"""


@settings_class
class ReproduceFigure(Places, Machine, Printed):
    """Draw figures of the paper: 1 and 3 to 7 from finished runs, 2 and 8 to 11 from measurements of time and memory.

    Examples:
      sparseffn reproduce figure fig3 fig5 --from runs/first/runs/sigma-moe/seed-0
      sparseffn reproduce figure fig2 fig8 --time-limit 20m
    """

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME ...", help_behavior_hint="")]
    """fig1 ... fig11"""
    from_: Annotated[tuple[str, ...], arg(name="from", metavar="RUN ...", help_behavior_hint="")] = ()
    """finished runs to draw (figures 1 and 3 to 7)"""
    max_tokens: MaybeInt = None
    """tokens of each split that are looked at, figures 1 and 3 to 7 (default: all)"""
    tokens: int = 2048
    """tokens of a timed call, figures 2 and 8 to 11"""
    time_limit: str = "20m"
    """for what is still to be timed, figures 2 and 8 to 11: 90s, 20m, 2h"""
    out: str = "runs/figures"
    """folder for the files"""
