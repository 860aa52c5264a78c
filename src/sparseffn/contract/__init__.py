"""The contract that every method keeps: a suite that anybody runs on a method of their own.

    from sparseffn.contract import check_method
    check_method("sigma-moe")            # or a config class

Each check has a name, under which its failure is reported and under which a method declares, in `xfail`, what it cannot keep
by its nature. A declared failure that does not happen is itself a failure.
"""

from sparseffn.contract.harness import CHECKS, ContractError, check_method, list_checks, run_check

__all__ = ["CHECKS", "ContractError", "check_method", "list_checks", "run_check"]
