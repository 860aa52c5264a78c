"""The paper's tables (arXiv 2310.10837) as data and functions: what was published, the settings that make each row, the runs.

published.toml   the paper's numbers, copied
published        reads them
scales           sizes and training settings of every column at the scales paper, base and cpu
rows             the settings that make each row
tables           which rows and columns a table has
pool             runs by the digest of their config; every table is a view on them
outcome          a table's JSON from the pool
dry_run          parameters, FLOPs, memory and time of every run, without training
evidence         the order in which a budget of minutes is spent
"""
