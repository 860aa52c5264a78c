"""Types of every result file, one module a kind of result: what producers build and `report` reads.

    result = storage.read(path, ComparisonResult, fix="run `sparseffn compare` again")

Nothing here imports PyTorch, so that a report is made in a moment. Fields keep the names of version 0.1; one that came later
has a default, and what a type does not know is ignored.
"""
