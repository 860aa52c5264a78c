"""All of arXiv 2310.10837: what was published and claimed, the settings of each row, the runs, the verdicts, the studies.

Published     published, statements and claims, each beside a TOML file of that name; claims has the verdicts
Tables        scales (sizes, settings), table_rows, tables; planned (cells with their runs), costs, counted (without training)
Runs          pool (by the digest of their config), execution (one run), jobs (many), evidence (within a budget of time)
Results       reproduction (what a user asks for), measured and table_notes (a table from the pool), figure_runs, figure_points
Studies       study, study_runs, study_start; predictions, initialisation, competition
"""
