"""All of arXiv 2310.10837: what was published and claimed, the settings of each row, the runs, the verdicts, the studies.

published    the paper's numbers (`published.toml`)          claims       its claims (`claims.toml`) and the verdicts on them
scales       sizes and training settings of every column at the scales paper, base and cpu
table_rows   the settings that make each row                 tables       which rows and columns a table has
planned      every cell with its model and its runs          pool         runs by the digest of their config
execution    does one run                                    measured     a table's result from the pool
costs        FLOPs, memory and time before a run             counted      tables without training
evidence     the order in which a budget of minutes is used
study        `sparseffn study`: why this selector, why this initialisation
"""
